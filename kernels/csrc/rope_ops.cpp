// rope_ (in place) and rope (into new memory) as torch operators.
#include "bindings.h"
#include "rope.h"

namespace {

using namespace megapt;

void turn(const Operator& op, const Tensor& x, const Tensor& out, const Tensor& cos, const Tensor& sin,
          const std::optional<Tensor>& positions, int64_t heads, bool back) {
    op.check(x.dim() == 3 && (x.numel() == 0 || x.stride(2) == 1), "x must be [T, N, D] with unit stride in D");
    op.check(cos.dim() == 2 && 2 * cos.size(1) <= x.size(2) && cos.size(0) > 0, "cos must be [S, R / 2] with R <= D");
    op.check_shape(sin, "sin", {cos.size(0), cos.size(1)});
    for (const auto& [name, t] : {std::pair("cos", &cos), std::pair("sin", &sin)}) {
        op.check_dtype(*t, name, ScalarType::Float);
        op.check_contiguous(*t, name);
        op.check_same_device(*t, name, x, "x");
    }
    op.check(heads >= 0 && heads <= x.size(1), "heads must be 0 to ", x.size(1), ", not ", heads);
    int position_bytes = 0;
    if (positions) {
        position_bytes = static_cast<int>(positions->element_size());
        op.check(positions->scalar_type() == ScalarType::Int || positions->scalar_type() == ScalarType::Long,
                 "positions must be Int or Long, not ", positions->scalar_type());
        op.check_shape(*positions, "positions", {x.size(0)});
        op.check_contiguous(*positions, "positions");
        op.check_same_device(*positions, "positions", x, "x");
    }
    const int dtype = op.dtype_of(x, "x");
    const DeviceGuard guard(x);
    op.check_launch(megapt_rope(x.data_ptr(), out.data_ptr(), static_cast<const float*>(cos.data_ptr()),
                                static_cast<const float*>(sin.data_ptr()), positions ? positions->data_ptr() : nullptr,
                                position_bytes, x.size(0), cos.size(0), cos.size(1), heads, x.size(1), x.size(2),
                                x.stride(0), x.stride(1), out.stride(0), out.stride(1), back, dtype,
                                current_stream(x)));
}

void rope_(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> positions, int64_t heads, bool back) {
    turn(Operator("rope_"), x, x, cos, sin, positions, heads, back);
}

Tensor rope(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> positions, int64_t heads, bool back) {
    const Operator op("rope");
    op.check(x.dim() == 3, "x must be [T, N, D]");
    Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
    turn(op, x, out, cos, sin, positions, heads, back);
    return out;
}

}  // namespace

MEGAPT_LIBRARY_FRAGMENT(m) {
    m.def("rope_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions, int heads, bool back) -> ()");
    m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int heads, bool back) -> Tensor");
}

MEGAPT_LIBRARY_IMPL(m) {
    m.impl("rope_", TORCH_BOX(&rope_));
    m.impl("rope", TORCH_BOX(&rope));
}
