//! Linear layers in the forms that the integer kernels read.

use super::{LowRank, Weight, quantize_rows_symmetric};
use crate::kernels::KernelSet;
use crate::kernels::forms::{
    CodebookParts, GroupParts, LayerShape, PackedBlocks, PackedCodebook, PackedGroups, PackedMatrix,
};
use crate::kernels::layout::PackedLinear;

/// A linear layer as it is executed.
#[derive(Debug, Clone)]
pub enum PackedLayer {
    /// One product.
    Whole(PackedMatrix),
    /// `y = up (down x) + b`, two products.
    Factors {
        /// `[rank, n_in]`, no bias.
        down: PackedMatrix,
        /// `[n_out, rank]`.
        up: PackedMatrix,
    },
}

impl PackedLayer {
    /// Packs a linear layer `[bias.len(), n_in]` in the form that it is stored in; f32 weights are quantized on the way,
    /// one scale per output channel.
    ///
    /// # Panics
    /// If the parts do not fit ([`Weight::check`]).
    #[must_use]
    pub fn new(weight: &Weight<'_>, bias: &[f32], n_in: usize) -> Self {
        match weight {
            Weight::LowRank(LowRank { rank, down, up }) => {
                Self::Factors { down: pack_matrix(down, &vec![0.0; *rank], n_in), up: pack_matrix(up, bias, *rank) }
            }
            whole => Self::Whole(pack_matrix(whole, bias, n_in)),
        }
    }

    /// Outputs.
    #[must_use]
    pub fn n_out(&self) -> usize {
        match self {
            Self::Whole(whole) => whole.n_out(),
            Self::Factors { up, .. } => up.n_out(),
        }
    }

    /// Inputs.
    #[must_use]
    pub fn n_in(&self) -> usize {
        match self {
            Self::Whole(whole) => whole.n_in(),
            Self::Factors { down, .. } => down.n_in(),
        }
    }

    /// Width of what is between the factors; 0 without.
    #[must_use]
    pub fn rank(&self) -> usize {
        match self {
            Self::Whole(_) => 0,
            Self::Factors { down, .. } => down.n_out(),
        }
    }

    /// The same as `kernels` want it.
    #[must_use]
    pub fn fit(self, kernels: &KernelSet) -> Self {
        match self {
            Self::Whole(whole) => Self::Whole(kernels.fit(whole)),
            Self::Factors { down, up } => Self::Factors { down: kernels.fit(down), up: kernels.fit(up) },
        }
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Whole(whole) => whole.bytes(),
            Self::Factors { down, up } => down.bytes() + up.bytes(),
        }
    }
}

/// Packs a matrix that is no product.
///
/// # Panics
/// If it is one, or its parts do not fit.
#[must_use]
pub fn pack_matrix(weight: &Weight<'_>, bias: &[f32], n_in: usize) -> PackedMatrix {
    let layer = LayerShape { bias, n_in };
    match weight {
        Weight::F32(values) => {
            let (codes, scale) = quantize_rows_symmetric(values, n_in);
            PackedMatrix::Dense(PackedLinear::new(&codes, &scale, bias, n_in))
        }
        Weight::Int8 { codes, scale } => PackedMatrix::Dense(PackedLinear::new(codes, scale, bias, n_in)),
        Weight::Int8Affine { codes, scale, offset } => {
            PackedMatrix::Blocks(PackedBlocks::affine(codes, scale, offset, layer))
        }
        Weight::Int8Grouped(grouped) => {
            let parts = GroupParts {
                codes: &grouped.codes,
                scale: &grouped.scale,
                offset: grouped.offset.as_deref(),
                group: super::Codebook4::group_len(n_in, grouped.n_groups),
            };
            PackedMatrix::Groups(PackedGroups::new(parts, layer))
        }
        Weight::Codebook4(codebook) => {
            let parts = CodebookParts {
                table: codebook.table,
                scale: &codebook.scale,
                zero: codebook.zero.as_deref(),
                n_groups: codebook.n_groups,
                group: super::Codebook4::group_len(n_in, codebook.n_groups),
            };
            PackedMatrix::Codebook(PackedCodebook::new(parts, |n, k| codebook.index(n_in, n, k), layer))
        }
        Weight::BlockSparse(sparse) => {
            let groups = sparse.groups(n_in);
            PackedMatrix::Blocks(PackedBlocks::new(sparse.width, groups, &sparse.blocks, &sparse.scale, layer))
        }
        Weight::Bitmap(bitmap) => {
            PackedMatrix::Dense(PackedLinear::new(&bitmap.dense_codes(n_in), &bitmap.scale, bias, n_in))
        }
        Weight::LowRank(_) => unreachable!("a factor is no product itself (Weight::check)"),
    }
}
