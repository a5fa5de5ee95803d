//! Slices cut into disjoint parts, for threads that each write some of them.
#![allow(unsafe_code, reason = "slices are cut into disjoint parts")]

use std::marker::PhantomData;
use std::ops::Range;

use crate::kernels::layout::rows_fit;

/// Something that falls into disjoint parts, so that threads can each take some of them mutably.
///
/// # Safety
/// Parts of different indices below `n_parts` must not overlap, and must be valid for `'a`.
pub unsafe trait Parts<'a>: Sync {
    /// One part.
    type Part;
    /// Number of parts.
    fn n_parts(&self) -> usize;
    /// Part `index`.
    ///
    /// # Safety
    /// `index < n_parts`, and no index is taken twice while the first part of that index lives.
    unsafe fn part(&self, index: usize) -> Self::Part;
}

/// Where rows are cut into blocks.
#[derive(Debug, Clone, Copy)]
pub enum Cut<'a> {
    /// Blocks of `block` rows (at least 1), the last one shorter.
    Even {
        /// Rows in all.
        n_rows: usize,
        /// Rows of a block.
        block: usize,
    },
    /// Block `i` is `bounds[i]..bounds[i + 1]`, ascending.
    At(&'a [usize]),
}

impl Cut<'_> {
    /// Number of blocks.
    #[must_use]
    pub fn n_parts(&self) -> usize {
        match self {
            Self::Even { n_rows, block } => n_rows.div_ceil((*block).max(1)),
            Self::At(bounds) => bounds.len().saturating_sub(1),
        }
    }

    /// Rows of block `index`.
    #[must_use]
    pub fn rows(&self, index: usize) -> Range<usize> {
        match self {
            Self::Even { n_rows, block } => {
                let block = (*block).max(1);
                index * block..((index + 1) * block).min(*n_rows)
            }
            Self::At(bounds) => bounds[index]..bounds[index + 1],
        }
    }

    fn end(&self) -> usize {
        match self {
            Self::Even { n_rows, .. } => *n_rows,
            Self::At(bounds) => {
                assert!(bounds.is_sorted(), "the bounds of a cut ascend");
                bounds.last().copied().unwrap_or(0)
            }
        }
    }
}

/// A slice of rows of `width` elements, cut into blocks of rows.
#[derive(Debug)]
pub struct RowParts<'a, T> {
    data: *mut T,
    width: usize,
    cut: Cut<'a>,
    lent: PhantomData<&'a mut [T]>,
}

impl<'a, T> RowParts<'a, T> {
    /// Cuts `data`, rows of `width` elements.
    ///
    /// # Panics
    /// If the rows of the cut are not all in `data`.
    #[must_use]
    pub fn new(data: &'a mut [T], width: usize, cut: Cut<'a>) -> Self {
        assert!(
            rows_fit(data.len(), cut.end(), width, width),
            "{} rows of {width} in {} elements",
            cut.end(),
            data.len()
        );
        Self { data: data.as_mut_ptr(), width, cut, lent: PhantomData }
    }
}

// SAFETY: the pointer stands for an exclusive borrow, whose parts are handed to one thread each.
unsafe impl<T: Send> Sync for RowParts<'_, T> {}

// SAFETY: blocks of a cut are disjoint ranges of rows inside the borrowed slice (checked in `new`).
unsafe impl<'a, T: Send> Parts<'a> for RowParts<'a, T> {
    type Part = &'a mut [T];

    fn n_parts(&self) -> usize {
        self.cut.n_parts()
    }

    unsafe fn part(&self, index: usize) -> &'a mut [T] {
        let rows = self.cut.rows(index);
        // SAFETY: in bounds and disjoint from every other index, see `Cut` and `new`; taken once by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(rows.start * self.width), rows.len() * self.width) }
    }
}

/// A matrix cut in panels, `[n_panels, n_rows, width]`, each part holding a block of rows of every panel.
#[derive(Debug)]
pub struct PanelRowParts<'a, T> {
    data: *mut T,
    n_panels: usize,
    n_rows: usize,
    width: usize,
    cut: Cut<'a>,
    lent: PhantomData<&'a mut [T]>,
}

impl<'a, T> PanelRowParts<'a, T> {
    /// Cuts the rows of every panel of `data`.
    ///
    /// # Panics
    /// If the sizes do not fit.
    #[must_use]
    pub fn new(data: &'a mut [T], n_rows: usize, width: usize, cut: Cut<'a>) -> Self {
        let panel = n_rows.checked_mul(width).expect("a panel has less than 2^64 elements");
        assert!(data.len().is_multiple_of(panel) && cut.end() <= n_rows, "{} by {panel}", data.len());
        Self {
            n_panels: data.len().checked_div(panel).unwrap_or(0),
            data: data.as_mut_ptr(),
            n_rows,
            width,
            cut,
            lent: PhantomData,
        }
    }
}

/// A block of rows of every panel.
#[derive(Debug)]
pub struct PanelRows<'a, T> {
    data: *mut T,
    n_panels: usize,
    panel: usize,
    len: usize,
    lent: PhantomData<&'a mut [T]>,
}

impl<T> PanelRows<'_, T> {
    /// The block's rows of panel `index`.
    ///
    /// # Panics
    /// If there is no such panel.
    pub fn panel(&mut self, index: usize) -> &mut [T] {
        assert!(index < self.n_panels, "panel {index} of {}", self.n_panels);
        // SAFETY: in bounds (checked here and in `PanelRowParts::new`); the rows of this block belong to this value.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(index * self.panel), self.len) }
    }
}

// SAFETY: as for `RowParts`.
unsafe impl<T: Send> Sync for PanelRowParts<'_, T> {}

// SAFETY: blocks of a cut are disjoint ranges of rows, in every panel.
unsafe impl<'a, T: Send> Parts<'a> for PanelRowParts<'a, T> {
    type Part = PanelRows<'a, T>;

    fn n_parts(&self) -> usize {
        self.cut.n_parts()
    }

    unsafe fn part(&self, index: usize) -> PanelRows<'a, T> {
        let rows = self.cut.rows(index);
        PanelRows {
            // SAFETY: the first row of the block is inside the first panel, see `new`.
            data: unsafe { self.data.add(rows.start * self.width) },
            n_panels: self.n_panels,
            panel: self.n_rows * self.width,
            len: rows.len() * self.width,
            lent: PhantomData,
        }
    }
}

macro_rules! tuple_parts {
    ($($name:ident $index:tt),+) => {
        // SAFETY: each member is disjoint by its own index.
        unsafe impl<'a, $($name: Parts<'a>),+> Parts<'a> for ($($name,)+) {
            type Part = ($($name::Part,)+);

            fn n_parts(&self) -> usize {
                let n_parts = self.0.n_parts();
                $(assert_eq!(n_parts, self.$index.n_parts(), "members fall into different numbers of parts");)+
                n_parts
            }

            unsafe fn part(&self, index: usize) -> Self::Part {
                // SAFETY: passed on unchanged.
                unsafe { ($(self.$index.part(index),)+) }
            }
        }
    };
}
tuple_parts!(A 0, B 1);
tuple_parts!(A 0, B 1, C 2);
tuple_parts!(A 0, B 1, C 2, D 3);
