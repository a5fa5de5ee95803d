//! Matrices of low rank: two products, with what is between them rounded to codes per row, as every input is.

use super::{Buffer, Codes, Int8, RowParts, row_shares};
use crate::exec::workspace::Aligned;
use crate::kernels::forms::PackedMatrix;
use crate::kernels::layout::{CodeRows, PANEL, RowScale, STRIP, code_stride};
use crate::kernels::{Block, CodeRowsMut, KernelSet};
use crate::quant::PackedLayer;

/// Room for what a block of rows needs before its product: what is between two factors, and codes in the kernels' own form.
#[derive(Debug, Default)]
pub(super) struct Middle {
    block: Aligned,
    codes: Aligned,
    scales: Aligned,
    turned: Aligned,
}

impl Middle {
    /// Room for `n_rows` rows of rank `rank`, and for inputs of products up to `widest`.
    pub(super) fn new(kernels: &KernelSet, n_rows: usize, rank: usize, widest: usize) -> Self {
        Self {
            turned: Aligned::with_bytes(if kernels.turns() {
                n_rows.next_multiple_of(STRIP) * code_stride(widest)
            } else {
                0
            }),
            block: Aligned::with_bytes(n_rows * rank.next_multiple_of(PANEL) * 4),
            codes: Aligned::with_bytes(n_rows * code_stride(rank)),
            scales: Aligned::with_bytes(if rank == 0 { 0 } else { n_rows * size_of::<RowScale>() }),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.block.bytes() + self.codes.bytes() + self.scales.bytes() + self.turned.bytes()
    }

    /// The last product of `layer` and its input for the rows `x`, which are computed here if there is a first product.
    pub(super) fn enter<'a>(
        &'a mut self,
        kernels: &KernelSet,
        layer: &'a PackedLayer,
        x: CodeRows<'a>,
    ) -> (CodeRows<'a>, &'a PackedMatrix) {
        let (down, up) = match layer {
            PackedLayer::Whole(whole) => return (kernels.turn(x, whole, |n| self.turned.first(n)), whole),
            PackedLayer::Factors { down, up } => (down, up),
        };
        let (n_rows, rank) = (x.scales.len(), down.n_out());
        let stride = code_stride(rank);
        let x = kernels.turn(x, down, |n| self.turned.first(n));
        let block = self.block.first::<f32>(down.n_panels() * n_rows * PANEL);
        for (panel, out) in block.chunks_exact_mut((n_rows * PANEL).max(1)).enumerate() {
            kernels.product_f32(&x, down, panel..down.n_panels(), out);
        }
        let codes = self.codes.first::<u8>(n_rows * stride);
        let scales = self.scales.first::<RowScale>(n_rows);
        let block = Block { data: block, n_rows, n: rank };
        kernels.quantize(
            block,
            0..n_rows,
            &mut CodeRowsMut { codes: &mut *codes, stride, scales: &mut *scales, range: None },
        );
        let x = CodeRows::new(codes, stride, scales);
        (kernels.turn(x, up, |n| self.turned.first(n)), up)
    }
}

impl PackedLayer {
    /// The product that yields the outputs.
    pub(super) fn last(&self) -> &PackedMatrix {
        match self {
            Self::Whole(whole) => whole,
            Self::Factors { up, .. } => up,
        }
    }
}

impl Int8 {
    /// What is between the factors of `layer` for a few rows, columns split over threads.
    pub(super) fn middle(&mut self, layer: &PackedLayer, x: &Codes, n_rows: usize) -> Option<Codes> {
        let PackedLayer::Factors { down, .. } = layer else { return None };
        let rank = down.n_out();
        let block = self.columns(down, x, n_rows);
        let mut to = self.codes(n_rows, rank);
        let stride = to.stride;
        let Self { kernels, cores, seat, .. } = self;
        let seat = seat.get_or_insert_with(|| cores.enter());
        let shares = row_shares(n_rows, KernelSet::MOST_BLOCK_ROWS, seat);
        let cut = shares.cut();
        let parts = (RowParts::new(&mut to.codes, stride, cut), RowParts::new(&mut to.scales, 1, cut));
        seat.for_each(parts, |_, index, (codes, scales): (&mut [u8], &mut [RowScale])| {
            let mut to = CodeRowsMut { codes, stride, scales, range: None };
            kernels.quantize(Block { data: &block, n_rows, n: rank }, cut.rows(index), &mut to);
        });
        Some(to)
    }

    /// `x Wᵀ + b` of a few rows, columns split over threads; a block of all rows.
    pub(super) fn layer_columns(&mut self, layer: &PackedLayer, x: &Codes, n_rows: usize) -> Buffer<f32> {
        let middle = self.middle(layer, x, n_rows);
        self.columns(layer.last(), middle.as_ref().unwrap_or(x), n_rows)
    }
}
