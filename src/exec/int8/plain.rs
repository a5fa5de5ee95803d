//! Layers in f32: the classification head, once per sequence.

use super::{Form, Int8, Int8Act, Int8Error, nonlinearity};
use crate::exec::int8_build::F32Linear;
use crate::kernels::dense;
use crate::kernels::threads::{Cut, RowParts};
use crate::model::{Activation, ModelError};

impl Int8 {
    /// A layer of the classification head over pooled rows, in f32.
    pub(super) fn plain(&mut self, linear: &F32Linear, x: &Int8Act, then: Activation) -> Result<Int8Act, ModelError> {
        let Form::Rows(rows) = &x.form else {
            return self.refuse(Int8Error::Form { verb: "linear" });
        };
        let (n_in, n_out) = (linear.n_in, linear.bias.len());
        if x.n != n_in {
            return self.refuse(Int8Error::Width { verb: "linear", expected: n_in, got: x.n });
        }
        let mut out = self.workspace.take::<f32>(x.n_rows * n_out);
        let Self { kernels, cores, seat, .. } = self;
        let seat = seat.get_or_insert_with(|| cores.enter());
        let parts = RowParts::new(&mut out, n_out, Cut::Even { n_rows: x.n_rows, block: 1 });
        seat.for_each(parts, |_, index, out: &mut [f32]| {
            dense(&rows[index * n_in..(index + 1) * n_in], &linear.weight, &linear.bias, out);
            if let Some(then) = nonlinearity(then) {
                kernels.activate(then, out);
            }
        });
        Ok(Int8Act { n_rows: x.n_rows, n: n_out, form: Form::Rows(out) })
    }
}
