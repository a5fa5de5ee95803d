//! One function pointer per kernel, and the macros that instantiate the generic bodies for an instruction set.

use super::attend::table::Forms;
use super::ends::{Added, Topped};
use super::gemm::Gemm;
use super::norm::{Add, Normalize};
use super::rows::Quantize;
use crate::kernels::layout::RowTop;
use crate::kernels::{Nonlinearity, Reduction};

/// Turns codes: where they are, their stride, rows, inputs, and where they go.
pub(super) type Turn = unsafe fn(*const u8, usize, usize, usize, *mut u8);

/// The kernels of an instruction set. Each is `unsafe`, because it needs the instruction set and valid pointers.
pub(super) struct Table {
    pub(super) name: &'static str,
    /// Rows of a block for products of few inputs, and of many.
    pub(super) block_rows: [usize; 2],
    /// Codes by input, where dense products are made of split weights.
    pub(super) turn: Option<Turn>,
    pub(super) gemm_i32: unsafe fn(&Gemm<i32>),
    pub(super) gemm_f32: unsafe fn(&Gemm<f32>),
    pub(super) gemm_half: unsafe fn(&Gemm<u16>),
    /// Products of whole panels whose values go on before they are stored, where there are any.
    pub(super) gemm_topped: Option<unsafe fn(&Gemm<Topped>)>,
    pub(super) gemm_added: Option<unsafe fn(&Gemm<Added>)>,
    pub(super) activate: unsafe fn(Nonlinearity, *mut f32, usize),
    pub(super) tops: unsafe fn(*const f32, usize, usize, *mut RowTop),
    pub(super) quantize: unsafe fn(&Quantize),
    pub(super) add: unsafe fn(&Add),
    pub(super) normalize: unsafe fn(&Normalize),
    pub(super) add_codes: unsafe fn(*mut f32, *const i8, f32, usize),
    pub(super) reduce: unsafe fn(Reduction, *const f32, usize, usize, *mut f32),
    pub(super) attention: Forms,
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

/// `static TABLE` with the bodies of `rows.rs`, `norm.rs` and `activations.rs` instantiated under the given target features: name, matrix product,
/// vectors, rows of a block, forms of attention.
macro_rules! kernel_table {
    (#[$features:meta] $name:literal, $gemm:ident, $simd:ident, $block_rows:literal, $attention:expr) => {
        pub(in crate::kernels::arch) static TABLE: $crate::kernels::arch::table::Table = {
            use $crate::kernels::arch::activations;
            use $crate::kernels::arch::norm::{self, Add, Normalize};
            use $crate::kernels::arch::rows::{self, Quantize};
            use $crate::kernels::arch::table::Table;
            use $crate::kernels::layout::RowTop;
            use $crate::kernels::{Nonlinearity, Reduction};

            #[$features]
            unsafe fn activate(kind: Nonlinearity, values: *mut f32, n: usize) {
                // SAFETY: passed on unchanged, under the target features that the vectors need.
                unsafe { activations::activate::<$simd>(kind, values, n) }
            }
            #[$features]
            unsafe fn tops(values: *const f32, n_rows: usize, n: usize, tops: *mut RowTop) {
                // SAFETY: passed on unchanged.
                unsafe { rows::tops::<$simd>(values, n_rows, n, tops) }
            }
            #[$features]
            unsafe fn quantize(args: &Quantize) {
                // SAFETY: passed on unchanged.
                unsafe { rows::quantize::<$simd>(args) }
            }
            #[$features]
            unsafe fn add(args: &Add) {
                // SAFETY: passed on unchanged.
                unsafe { norm::add::<$simd>(args) }
            }
            #[$features]
            unsafe fn normalize(args: &Normalize) {
                // SAFETY: passed on unchanged.
                unsafe { norm::normalize::<$simd>(args) }
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
            Table {
                name: $name,
                block_rows: [$block_rows, $block_rows],
                turn: None,
                gemm_i32: $gemm::<i32>,
                gemm_f32: $gemm::<f32>,
                gemm_half: $gemm::<u16>,
                gemm_topped: None,
                gemm_added: None,
                activate,
                tops,
                quantize,
                add,
                normalize,
                add_codes,
                reduce,
                attention: $attention,
            }
        };
    };
}
pub(super) use kernel_table;
