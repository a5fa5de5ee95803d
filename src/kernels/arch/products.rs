//! Matrix products of every form of [`PackedMatrix`]: the instantiations per instruction set, and their safe face.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::KernelSet;
use super::blocks::Blocks;
use super::codebook::Codebook;
use super::gemm::{Gemm, Split};
use super::groups::Groups;
use crate::kernels::forms::{PAIR, PackedBlocks, PackedCodebook, PackedGroups, PackedMatrix, PanelGroups};
use crate::kernels::isa::IsaName;
use crate::kernels::layout::{CodeRows, PANEL, PackedLinear, PanelColumns, STRIP, rows_fit};

/// By how large the weights are: within ±32, within ±64, any.
type BySize<T> = [unsafe fn(&Codebook<T>); 3];

/// Kernels for results of one type, by form of the weights.
struct ByForm<T> {
    codebook: BySize<T>,
    grouped: Option<BySize<T>>,
    blocks: unsafe fn(&Blocks<T>),
    offset_blocks: Option<unsafe fn(&Blocks<T>)>,
    groups: Option<unsafe fn(&Groups<T>)>,
    /// For codebooks whose weights are decoded once for many rows: how, and the product of dense INT8.
    ahead: Option<Ahead<T>>,
}

/// Decodes a panel into the layout of dense INT8.
type Decode<T> = unsafe fn(&Codebook<T>, *mut i8);

/// Decoding ahead of a dense product.
struct Ahead<T> {
    decode: Decode<T>,
    dense: unsafe fn(&Gemm<T>),
}

/// Rows from which decoding a panel once is faster than decoding it for every tile of rows.
const AHEAD_ROWS: usize = 13;
/// Most inputs of a panel that is decoded ahead.
const AHEAD_INPUTS: usize = 2_048;

/// Sums of codes, for dot products that take none off: whatever they are.
static NO_BIAS: [[i32; PANEL]; AHEAD_INPUTS / PAIR] = [[0; PANEL]; AHEAD_INPUTS / PAIR];

/// Room for a decoded panel.
#[repr(C, align(64))]
struct Decoded([MaybeUninit<i8>; AHEAD_INPUTS * PANEL]);

/// The kernels of an instruction set beside those for dense INT8.
pub(super) struct FormKernels {
    int: ByForm<i32>,
    float: ByForm<f32>,
    half: ByForm<u16>,
}

/// All tiles of `$width` columns of a panel or strip. Rows are taken as many at once as their prepared codes have room for,
/// then columns outside, so that their weights stay in the first cache over those rows.
macro_rules! tiles {
    ($args:expr, $k:expr, $width:expr, $rows:literal x $vectors:literal, $tile:ident::<$dot:ty, $sink:ty>) => {
        let gemm = &$args.gemm;
        let mut room = <$dot as Dot>::room();
        let step = $vectors * <<$dot as Dot>::S as Simd>::LANES;
        for (first, n_rows) in row_tiles(gemm.n_rows, <$dot as Dot>::rows_at_once($k)) {
            // SAFETY: passed on; rows and columns are in range.
            unsafe {
                let codes = gemm.codes.add(first * gemm.stride);
                let (codes, stride) = <$dot as Dot>::prepare(&mut room, codes, gemm.stride, n_rows, $k);
                for column in (0..$width).step_by(step) {
                    for (row, n_rows) in row_tiles(n_rows, $rows) {
                        let tile = Tile { row: first + row, column, codes: codes.add(row * stride), stride };
                        match n_rows {
                            0 => {}
                            1 => $tile::<$dot, $sink, { up_to(1, $rows) }, $vectors>($args, tile),
                            2 => $tile::<$dot, $sink, { up_to(2, $rows) }, $vectors>($args, tile),
                            3 => $tile::<$dot, $sink, { up_to(3, $rows) }, $vectors>($args, tile),
                            4 => $tile::<$dot, $sink, { up_to(4, $rows) }, $vectors>($args, tile),
                            5 => $tile::<$dot, $sink, { up_to(5, $rows) }, $vectors>($args, tile),
                            _ => $tile::<$dot, $sink, { up_to(6, $rows) }, $vectors>($args, tile),
                        }
                    }
                }
            }
        }
    };
}

const fn up_to(n: usize, most: usize) -> usize {
    if n < most { n } else { most }
}

/// A module with the bodies of `codebook.rs`, `blocks.rs` and `groups.rs` for one dot product under the given target features, in tiles of
/// `$rows` rows by `$vectors` vectors. Tiles are not inlined: beside the loops over them the compiler would compute where their rows start
/// in every step.
macro_rules! products {
    ($name:ident: #[$features:meta] $dot:ty, $rows:literal x $vectors:literal) => {
        #[allow(dead_code, reason = "some instruction sets use a dot product for a part of the forms alone")]
        pub(in crate::kernels::arch) mod $name {
            use crate::kernels::arch::blocks::{self, Blocks};
            use crate::kernels::arch::codebook::{self, Codebook};
            use crate::kernels::arch::dot::Dot;
            use crate::kernels::arch::gemm::{Sink, ValueSink, row_tiles};
            use crate::kernels::arch::groups::{self, Groups};
            use crate::kernels::arch::products::up_to;
            use crate::kernels::arch::simd::Simd;
            use crate::kernels::arch::tile::Tile;
            use crate::kernels::forms::PAIR;
            use crate::kernels::layout::PANEL;

            #[$features]
            #[inline(never)]
            unsafe fn plain_tile<D: Dot, T: Sink, const R: usize, const V: usize>(args: &Codebook<T>, tile: Tile) {
                // SAFETY: passed on unchanged, under the target features that the bodies need.
                unsafe { codebook::tile::<D, T, R, V>(args, tile) }
            }
            #[$features]
            #[inline(never)]
            unsafe fn grouped_tile<D: Dot, T: ValueSink, const R: usize, const V: usize>(
                args: &Codebook<T>,
                tile: Tile,
            ) {
                // SAFETY: passed on unchanged.
                unsafe { codebook::grouped_tile::<D, T, R, V>(args, tile) }
            }
            #[$features]
            #[inline(never)]
            unsafe fn block_tile<D: Dot, T: Sink, const R: usize, const V: usize>(args: &Blocks<T>, tile: Tile) {
                // SAFETY: passed on unchanged.
                unsafe { blocks::tile::<D, T, R, V>(args, tile) }
            }
            #[$features]
            #[inline(never)]
            unsafe fn offset_tile<D: Dot, T: ValueSink, const R: usize, const V: usize>(args: &Blocks<T>, tile: Tile) {
                // SAFETY: passed on unchanged.
                unsafe { blocks::offset_tile::<D, T, R, V>(args, tile) }
            }

            #[$features]
            #[inline(never)]
            unsafe fn groups_tile<D: Dot, T: ValueSink, const R: usize, const V: usize>(args: &Groups<T>, tile: Tile) {
                // SAFETY: passed on unchanged.
                unsafe { groups::tile::<D, T, R, V>(args, tile) }
            }

            #[$features]
            pub(in crate::kernels::arch::products) unsafe fn plain<T: Sink>(args: &Codebook<T>) {
                let k = args.n_in.next_multiple_of(PAIR);
                tiles!(args, k, PANEL, $rows x $vectors, plain_tile::<$dot, T>);
            }
            #[$features]
            pub(in crate::kernels::arch::products) unsafe fn grouped<T: ValueSink>(args: &Codebook<T>) {
                let k = args.n_in.next_multiple_of(PAIR);
                tiles!(args, k, PANEL, $rows x $vectors, grouped_tile::<$dot, T>);
            }
            #[$features]
            pub(in crate::kernels::arch::products) unsafe fn blocks<T: Sink>(args: &Blocks<T>) {
                let k = args.n_in.next_multiple_of(4);
                tiles!(args, k, args.width, $rows x $vectors, block_tile::<$dot, T>);
            }
            #[$features]
            pub(in crate::kernels::arch::products) unsafe fn offset_blocks<T: ValueSink>(args: &Blocks<T>) {
                let k = args.n_in.next_multiple_of(4);
                tiles!(args, k, args.width, $rows x $vectors, offset_tile::<$dot, T>);
            }
            #[$features]
            pub(in crate::kernels::arch) unsafe fn in_groups<T: ValueSink>(args: &Groups<T>) {
                let k = args.n_in.next_multiple_of(4);
                tiles!(args, k, PANEL, $rows x $vectors, groups_tile::<$dot, T>);
            }
        }
    };
}

/// `static FORMS`: dot products for weights within ±32, within ±64 and any, and for strips of 32 columns.
macro_rules! forms {
    ($within32:ident, $within64:ident, $any:ident, $narrow:ident) => {
        forms! { $within32, $within64, $any, $narrow, None, $any::in_groups }
    };
    ($within32:ident, $within64:ident, $any:ident, $narrow:ident, $ahead:expr, $groups:path) => {
        use super::{Blocks, ByForm, FormKernels};
        use crate::kernels::arch::gemm::{Sink, ValueSink};
        use crate::kernels::layout::PANEL;

        unsafe fn blocks<T: Sink>(args: &Blocks<T>) {
            // SAFETY: passed on; the instruction set is present by contract.
            unsafe { if args.width == PANEL { $any::blocks(args) } else { $narrow::blocks(args) } }
        }
        const fn integers<T: Sink>() -> ByForm<T> {
            ByForm {
                codebook: [$within32::plain::<T>, $within64::plain::<T>, $any::plain::<T>],
                grouped: None,
                blocks: blocks::<T>,
                offset_blocks: None,
                groups: None,
                ahead: $ahead,
            }
        }
        const fn values<T: ValueSink>() -> ByForm<T> {
            ByForm {
                codebook: [$within32::plain::<T>, $within64::plain::<T>, $any::plain::<T>],
                grouped: Some([$within32::grouped::<T>, $within64::grouped::<T>, $any::grouped::<T>]),
                blocks: blocks::<T>,
                offset_blocks: Some($any::offset_blocks::<T>),
                groups: Some($groups),
                ahead: $ahead,
            }
        }
        pub(super) static FORMS: FormKernels = FormKernels { int: integers(), float: values(), half: values() };
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    products! { within32: #[target_feature(enable = "avx2,fma,f16c")] crate::kernels::arch::dot_x86::Avx2Within32, 4 x 2 }
    products! { within64: #[target_feature(enable = "avx2,fma,f16c")] crate::kernels::arch::dot_x86::Avx2Within64, 4 x 2 }
    products! { any: #[target_feature(enable = "avx2,fma,f16c")] crate::kernels::arch::dot_x86::Avx2Exact, 6 x 1 }
    forms! { within32, within64, any, any }
}

#[cfg(target_arch = "x86_64")]
mod avx_vnni {
    products! { any: #[target_feature(enable = "avx2,fma,f16c,avxvnni")] crate::kernels::arch::dot_x86::AvxVnni, 6 x 2 }
    forms! { any, any, any, any }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    products! {
        any: #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
        crate::kernels::arch::dot_x86::Avx512Vnni, 6 x 4
    }
    products! {
        narrow: #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
        crate::kernels::arch::dot_x86::Avx512Vnni, 6 x 2
    }
    use super::Ahead;
    use crate::kernels::arch::avx512::{decode, gemm};
    // As fast as dense INT8 from some rows on; decoding for every tile of six rows takes half as long again.
    forms! { any, any, any, narrow, Some(Ahead { decode: decode::<T>, dense: gemm::<T> }), any::in_groups }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod amx {
    use super::Ahead;
    pub(in crate::kernels::arch) use super::avx512::any;
    use super::avx512::narrow;
    use crate::kernels::arch::amx::{gemm, groups};
    use crate::kernels::arch::avx512::decode;
    forms! { any, any, any, narrow, Some(Ahead { decode: decode::<T>, dense: gemm::<T> }), groups }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    products! { any: #[target_feature(enable = "neon,dotprod")] crate::kernels::arch::neon::Neon, 4 x 4 }
    forms! { any, any, any, any }
}

mod portable {
    // An attribute that says nothing: no features are needed.
    products! { any: #[cfg(all())] crate::kernels::arch::portable::Portable, 2 x 2 }
    forms! { any, any, any, any }
}

pub(super) fn forms(isa: IsaName) -> &'static FormKernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        IsaName::AmxInt8 => &amx::FORMS,
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx512Vnni => &avx512::FORMS,
        #[cfg(target_arch = "x86_64")]
        IsaName::AvxVnni => &avx_vnni::FORMS,
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx2 => &avx2::FORMS,
        #[cfg(target_arch = "aarch64")]
        IsaName::NeonDotprod => &neon::FORMS,
        _ => &portable::FORMS,
    }
}

/// The arguments that all forms share, results in a block of a panel. `k` is how many codes of a row are read.
fn arguments<T>(x: &CodeRows<'_>, k: usize, weights: *const i8, columns: &PanelColumns, out: &mut [T]) -> Gemm<T> {
    let n_rows = x.scales.len();
    assert!(rows_fit(out.len(), n_rows, PANEL, PANEL), "{n_rows} rows of results in {} elements", out.len());
    shared(x, k, weights, columns, out.as_mut_ptr())
}

fn shared<T>(x: &CodeRows<'_>, k: usize, weights: *const i8, columns: &PanelColumns, out: *mut T) -> Gemm<T> {
    let n_rows = x.scales.len();
    assert!(rows_fit(x.codes.len(), n_rows, x.stride, k), "{n_rows} rows of {k} codes");
    Gemm {
        codes: x.codes.as_ptr(),
        stride: x.stride,
        whole_lines: x.has_whole_lines(),
        scales: x.scales.as_ptr(),
        n_rows,
        weights,
        k_groups: 0,
        columns: std::ptr::from_ref(columns),
        out,
        out_stride: PANEL,
        tops: std::ptr::null_mut(),
        sums: std::ptr::null_mut(),
        next: std::ptr::null(),
        split: None,
    }
}

impl<T> ByForm<T> {
    fn codebook(&self, x: &CodeRows<'_>, weights: &PackedCodebook, panel: usize, out: &mut [T]) {
        let n_in = weights.n_in();
        let (scales, zeros) = weights.groups(panel);
        let args = Codebook {
            gemm: arguments(x, n_in.next_multiple_of(PAIR), weights.panel(panel).cast(), weights.columns(panel), out),
            n_in,
            table: weights.table().as_ptr(),
            n_groups: scales.len(),
            group_pairs: weights.group_pairs(),
            scales: scales.as_ptr(),
            zeros: zeros.as_ptr(),
        };
        let pays = args.gemm.n_rows >= AHEAD_ROWS && n_in <= AHEAD_INPUTS;
        if let Some(ahead) = self.ahead.as_ref().filter(|_| pays) {
            return self.decoded(ahead, &args, weights.group_pairs() * PAIR);
        }
        let size = match weights.reach() {
            0..=32 => 0,
            33..=64 => 1,
            _ => 2,
        };
        let kernel = if scales.is_empty() {
            self.codebook[size]
        } else {
            self.grouped.expect("sums over groups of their own scales are not integers")[size]
        };
        // SAFETY: the instruction set is that of `self`; rows, panel and results are inside their slices, checked above
        // and by `PackedCodebook`.
        unsafe { kernel(&args) }
    }

    /// The product with a panel that is decoded first. A function of its own, so that others do not have its room on the stack.
    #[inline(never)]
    fn decoded(&self, ahead: &Ahead<T>, args: &Codebook<T>, group: usize) {
        let mut room = Decoded([const { MaybeUninit::uninit() }; AHEAD_INPUTS * PANEL]);
        let decoded: *mut i8 = room.0.as_mut_ptr().cast();
        // SAFETY: as in `codebook`; the room holds the panel, and of a row's codes `n_in` rounded up to four are read.
        unsafe {
            (ahead.decode)(args, decoded);
            let gemm = Gemm { weights: decoded, k_groups: args.n_in.div_ceil(4), ..args.gemm };
            if args.n_groups == 0 {
                return (ahead.dense)(&gemm);
            }
            let (scales, sums) = (args.scales, NO_BIAS.as_ptr());
            let groups = Groups { gemm, n_in: args.n_in, group, scales, sums, offsets: std::ptr::null() };
            self.groups.expect("where codebooks are decoded ahead there are groups")(&groups);
        }
    }

    fn blocks(&self, x: &CodeRows<'_>, weights: &PackedBlocks, panel: usize, out: &mut [T]) {
        let n_in = weights.n_in();
        let columns = weights.columns(panel);
        let offsets = weights.offsets(panel);
        let width = weights.width();
        for part in 0..PANEL / width {
            let (codes, inputs) = weights.strip(panel * (PANEL / width) + part);
            let args = Blocks {
                gemm: arguments(x, n_in.next_multiple_of(4), codes, columns, out),
                n_in,
                width,
                first_column: part * width,
                inputs: inputs.as_ptr(),
                n_blocks: inputs.len(),
                offsets: offsets.map_or(std::ptr::null(), |offsets| offsets.as_ptr()),
            };
            let kernel = match offsets {
                None => self.blocks,
                Some(_) => self.offset_blocks.expect("sums with real-valued offsets are not integers"),
            };
            // SAFETY: as above; each block's four inputs are below `n_in` rounded up to four.
            unsafe { kernel(&args) }
        }
    }
}

impl<T> ByForm<T> {
    fn groups(&self, x: &CodeRows<'_>, weights: &PackedGroups, panel: usize, out: &mut [T]) {
        let n_in = weights.n_in();
        let PanelGroups { scales, sums, offsets } = weights.groups(panel);
        let args = Groups {
            gemm: arguments(x, n_in.next_multiple_of(4), weights.panel(panel), weights.columns(panel), out),
            n_in,
            group: weights.group(),
            scales: scales.as_ptr(),
            sums: sums.as_ptr(),
            offsets: if offsets.is_empty() { std::ptr::null() } else { offsets.as_ptr() },
        };
        let kernel = self.groups.expect("sums over groups of their own scales are not integers");
        // SAFETY: as for codebooks.
        unsafe { kernel(&args) }
    }
}

impl KernelSet {
    /// The arguments of a dense product with the first of `panels`. It is the caller who knows how much `out` holds.
    ///
    /// # Panics
    /// If the sizes do not fit, or the weights were made to fit other kernels or codes are not turned for them.
    pub(super) fn arguments_to<T>(
        &self,
        x: &CodeRows<'_>,
        weights: &PackedLinear,
        panels: &Range<usize>,
        out: *mut T,
    ) -> Gemm<T> {
        let (k_groups, panel) = (weights.k_groups(), panels.start);
        let next = if panel + 1 < panels.end { weights.panel(panel + 1) } else { std::ptr::null() };
        let args =
            Gemm { k_groups, next, ..shared(x, k_groups * 4, weights.panel(panel), weights.columns(panel), out) };
        let Some((outliers, chains)) = weights.outliers(panel) else { return args };
        let n = args.n_rows.next_multiple_of(STRIP) * k_groups * 4;
        assert!(self.turns() && x.turned.len() == n, "weights with outliers, {} of {n} codes turned", x.turned.len());
        Gemm { split: Some(Split { turned: x.turned.as_ptr(), outliers: outliers.as_ptr(), chains }), ..args }
    }

    /// `out[r, c] = Σ_k codes[r, k] · weights[n, k]`, `n = panel · PANEL + c`, of any form whose sums are integers; exact.
    ///
    /// # Panics
    /// If the sizes do not fit, or the form has scales per group of inputs, zeros or offsets.
    pub fn product_i32(&self, x: &CodeRows<'_>, weights: &PackedMatrix, panel: usize, out: &mut [i32]) {
        match weights {
            PackedMatrix::Dense(dense) => self.gemm_i32(x, dense, panel, out),
            PackedMatrix::Codebook(codebook) => self.forms.int.codebook(x, codebook, panel, out),
            PackedMatrix::Blocks(blocks) => self.forms.int.blocks(x, blocks, panel, out),
            PackedMatrix::Groups(groups) => self.forms.int.groups(x, groups, panel, out),
        }
    }

    /// `x Wᵀ + b` for the columns of the first of `panels`, `[n_rows, PANEL]`, of any form; the next one is fetched meanwhile. *Error* beyond that of the stored numbers: of
    /// the rounding of a few f32 operations per group of inputs, 2e-6 of the largest result.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn product_f32(&self, x: &CodeRows<'_>, weights: &PackedMatrix, panels: Range<usize>, out: &mut [f32]) {
        match weights {
            PackedMatrix::Dense(dense) => self.gemm(self.table.gemm_f32, x, dense, panels, out),
            PackedMatrix::Codebook(codebook) => self.forms.float.codebook(x, codebook, panels.start, out),
            PackedMatrix::Blocks(blocks) => self.forms.float.blocks(x, blocks, panels.start, out),
            PackedMatrix::Groups(groups) => self.forms.float.groups(x, groups, panels.start, out),
        }
    }

    /// The same, rounded to binary16.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn product_half(&self, x: &CodeRows<'_>, weights: &PackedMatrix, panels: Range<usize>, out: &mut [u16]) {
        match weights {
            PackedMatrix::Dense(dense) => self.gemm(self.table.gemm_half, x, dense, panels, out),
            PackedMatrix::Codebook(codebook) => self.forms.half.codebook(x, codebook, panels.start, out),
            PackedMatrix::Blocks(blocks) => self.forms.half.blocks(x, blocks, panels.start, out),
            PackedMatrix::Groups(groups) => self.forms.half.groups(x, groups, panels.start, out),
        }
    }
}
