// Operators over glu.h: rows whose elements are contiguous, at any distance.
#include "glu.h"

#include "bindings.h"

namespace megapt {
namespace {

void check_rows(const Operator& op, const Tensor& x, const char* argument) {
    op.check(x.dim() == 2, argument, " must have two dimensions, not ", x.dim());
    op.check(x.size(1) == 1 || x.stride(1) == 1, argument, " must have rows of contiguous elements, not a stride of ",
             x.stride(1));
}

int check_xy(const Operator& op, const Tensor& xy, int64_t activation) {
    check_rows(op, xy, "xy");
    op.check(xy.size(1) > 0 && xy.size(1) % 2 == 0, "xy must have rows of gate and up, not of ", xy.size(1),
             " elements");
    op.check(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2, not ", activation);
    return op.dtype_of(xy, "xy");
}

Tensor glu(const Tensor& xy, int64_t activation) {
    const Operator op("glu");
    const int dtype = check_xy(op, xy, activation);
    const int64_t rows = xy.size(0), width = xy.size(1) / 2;
    const DeviceGuard guard(xy);
    const std::vector<int64_t> shape = {rows, width};
    Tensor y = torch::stable::new_empty(xy, shape);
    op.check_launch(megapt_glu(xy.data_ptr(), xy.stride(0), y.data_ptr(), rows, width, static_cast<int>(activation),
                               dtype, current_stream(xy)));
    return y;
}

Tensor glu_backward(const Tensor& dy, const Tensor& xy, int64_t activation) {
    const Operator op("glu_backward");
    const int dtype = check_xy(op, xy, activation);
    const int64_t rows = xy.size(0), width = xy.size(1) / 2;
    check_rows(op, dy, "dy");
    op.check_shape(dy, "dy", {rows, width});
    op.check_same_dtype(dy, "dy", xy, "xy");
    op.check_same_device(dy, "dy", xy, "xy");
    const DeviceGuard guard(xy);
    const std::vector<int64_t> shape = {rows, 2 * width};
    Tensor dxy = torch::stable::new_empty(xy, shape);
    op.check_launch(megapt_glu_backward(dy.data_ptr(), dy.stride(0), xy.data_ptr(), xy.stride(0), dxy.data_ptr(), rows,
                                        width, static_cast<int>(activation), dtype, current_stream(xy)));
    return dxy;
}

}  // namespace
}  // namespace megapt

MEGAPT_LIBRARY_FRAGMENT(m) {
    m.def("glu(Tensor xy, int activation) -> Tensor");
    m.def("glu_backward(Tensor dy, Tensor xy, int activation) -> Tensor");
}

MEGAPT_LIBRARY_IMPL(m) {
    m.impl("glu", TORCH_BOX(&megapt::glu));
    m.impl("glu_backward", TORCH_BOX(&megapt::glu_backward));
}
