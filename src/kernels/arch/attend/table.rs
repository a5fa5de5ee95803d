//! Function pointers of the forms of attention, and the macro that instantiates them for an instruction set.

use super::{Attend, Head};
use crate::kernels::attention::{AttentionForm, CacheLine};

/// Attention in one form.
#[derive(Clone, Copy)]
pub(in crate::kernels::arch) struct AttentionTable {
    pub(in crate::kernels::arch) form: AttentionForm,
    /// Cache lines of a packed head, by slots and padded width.
    pub(in crate::kernels::arch) lines: fn(usize, usize) -> usize,
    /// Floats of scratch, by slots visited and padded width.
    pub(in crate::kernels::arch) scratch: fn(usize, usize) -> usize,
    pub(in crate::kernels::arch) pack: unsafe fn(&Head<'_>, *mut CacheLine, *mut f32),
    pub(in crate::kernels::arch) attend: unsafe fn(&Attend<'_>),
}

/// The forms that an instruction set has.
#[derive(Clone, Copy)]
pub(in crate::kernels::arch) struct Forms {
    /// In the order in which they are preferred; the last one has no limit.
    pub(in crate::kernels::arch) preferred: &'static [AttentionForm],
    pub(in crate::kernels::arch) tables: &'static [AttentionTable],
}

/// An [`AttentionTable`] under the given target features: form, queries of a tile, vectors of a tile, vectors of a block.
macro_rules! attention {
    (#[$features:meta] $products:ty, $queries:literal, $vectors:literal, $block:literal) => {{
        use $crate::kernels::arch::attend::products::Products;
        use $crate::kernels::arch::attend::table::AttentionTable;
        use $crate::kernels::arch::attend::{self, Attend, Head};
        use $crate::kernels::attention::CacheLine;

        #[$features]
        unsafe fn pack(head: &Head<'_>, packed: *mut CacheLine, scratch: *mut f32) {
            // SAFETY: passed on unchanged, under the target features that the vectors need.
            unsafe { attend::pack::<$products>(head, packed, scratch) }
        }
        #[$features]
        unsafe fn attend(args: &Attend<'_>) {
            // SAFETY: passed on unchanged.
            unsafe { attend::attend::<$products, $queries, $vectors, $block>(args) }
        }
        AttentionTable {
            form: <$products as Products>::FORM,
            lines: attend::lines::<$products>,
            scratch: attend::scratch,
            pack,
            attend,
        }
    }};
}
pub(in crate::kernels::arch) use attention;
