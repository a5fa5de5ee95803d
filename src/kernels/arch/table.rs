//! One function pointer per kernel, and the macros that instantiate the generic bodies for an instruction set.

use super::attend::{Attend, Head};
use super::gemm::Gemm;
use super::rows::{AddNorm, Quantize};
use crate::kernels::attention::{AttentionForm, CacheLine};
use crate::kernels::{Nonlinearity, Reduction};

/// The kernels of an instruction set. Each is `unsafe`, because it needs the instruction set and valid pointers.
pub(super) struct Table {
    pub(super) name: &'static str,
    pub(super) gemm_i32: unsafe fn(&Gemm<i32>),
    pub(super) gemm_f32: unsafe fn(&Gemm<f32>),
    pub(super) gemm_half: unsafe fn(&Gemm<u16>),
    pub(super) activate: unsafe fn(Nonlinearity, *mut f32, usize),
    pub(super) quantize: unsafe fn(&Quantize),
    pub(super) add_norm: unsafe fn(&AddNorm),
    pub(super) add_codes: unsafe fn(*mut f32, *const i8, f32, usize),
    pub(super) reduce: unsafe fn(Reduction, *const f32, usize, usize, *mut f32),
    pub(super) attention: AttentionTable,
    pub(super) int8_attention: Option<AttentionTable>,
}

/// Attention in one form.
#[derive(Clone, Copy)]
pub(super) struct AttentionTable {
    pub(super) form: AttentionForm,
    /// Cache lines of a packed head, by length and padded width.
    pub(super) lines: fn(usize, usize) -> usize,
    /// Floats of scratch, by length and padded width.
    pub(super) scratch: fn(usize, usize) -> usize,
    pub(super) pack: unsafe fn(&Head, *mut CacheLine, *mut f32),
    pub(super) attend: unsafe fn(&Attend),
}

/// Trait functions that are one expression each.
macro_rules! one {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)? = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $type),*) $(-> $result)? {
            // SAFETY: the instruction set is present and the pointers are valid, by the trait's contract.
            #[allow(unused_unsafe, reason = "some bodies are plain Rust")]
            unsafe { $body }
        }
    )*};
}
pub(super) use one;

/// `static TABLE` with the bodies of `rows.rs` and `attend.rs` instantiated under the given target features: name, matrix
/// product, vectors, queries of an attention tile, vectors of a block of keys, INT8 attention.
macro_rules! kernel_table {
    (#[$features:meta] $name:literal, $gemm:ident, $simd:ident, $queries:literal, $vectors:literal, $int8:expr) => {
        pub(in crate::kernels::arch) static TABLE: $crate::kernels::arch::table::Table = {
            use $crate::kernels::arch::attend::{self, Attend, Head};
            use $crate::kernels::arch::rows::{self, AddNorm, Quantize};
            use $crate::kernels::arch::table::{AttentionTable, Table};
            use $crate::kernels::attention::{AttentionForm, CacheLine};
            use $crate::kernels::{Nonlinearity, Reduction};

            #[$features]
            unsafe fn activate(kind: Nonlinearity, values: *mut f32, n: usize) {
                // SAFETY: passed on unchanged, under the target features that the vectors need.
                unsafe { rows::activate::<$simd>(kind, values, n) }
            }
            #[$features]
            unsafe fn quantize(args: &Quantize) {
                // SAFETY: passed on unchanged.
                unsafe { rows::quantize::<$simd>(args) }
            }
            #[$features]
            unsafe fn add_norm(args: &AddNorm) {
                // SAFETY: passed on unchanged.
                unsafe { rows::add_norm::<$simd>(args) }
            }
            #[$features]
            unsafe fn add_codes(row: *mut f32, codes: *const i8, scale: f32, n: usize) {
                // SAFETY: passed on unchanged.
                unsafe { rows::add_codes::<$simd>(row, codes, scale, n) }
            }
            #[$features]
            unsafe fn reduce(kind: Reduction, from: *const f32, n_rows: usize, n: usize, out: *mut f32) {
                // SAFETY: passed on unchanged.
                unsafe { rows::reduce::<$simd>(kind, from, n_rows, n, out) }
            }
            #[$features]
            unsafe fn pack(head: &Head, packed: *mut CacheLine, scratch: *mut f32) {
                // SAFETY: passed on unchanged.
                unsafe { attend::pack::<$simd>(head, packed, scratch) }
            }
            #[$features]
            unsafe fn attend(args: &Attend) {
                // SAFETY: passed on unchanged.
                unsafe { attend::attend::<$simd, $queries, $vectors>(args) }
            }
            Table {
                name: $name,
                gemm_i32: $gemm::<i32>,
                gemm_f32: $gemm::<f32>,
                gemm_half: $gemm::<u16>,
                activate,
                quantize,
                add_norm,
                add_codes,
                reduce,
                attention: AttentionTable {
                    form: AttentionForm::F32,
                    lines: attend::lines,
                    scratch: attend::scratch,
                    pack,
                    attend,
                },
                int8_attention: $int8,
            }
        };
    };
}
pub(super) use kernel_table;
