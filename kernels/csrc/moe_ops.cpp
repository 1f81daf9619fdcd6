// The experts' permutation as torch operators.
#include "bindings.h"
#include "moe.h"

namespace {

using namespace megapt;

void check_rows(const Operator& op, const Tensor& rows, const char* argument) {
    op.check(rows.dim() == 2, argument, " must have two dimensions, not ", rows.dim());
    op.check_contiguous(rows, argument);
}

// A contiguous tensor of indices or weights on the device of `like`.
template <class T>
T* data(const Operator& op, const Tensor& t, const char* argument, ScalarType dtype, const Tensor& like) {
    op.check_dtype(t, argument, dtype);
    op.check_contiguous(t, argument);
    op.check_same_device(t, argument, like, "the rows");
    return static_cast<T*>(t.data_ptr());
}

Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(like, shape, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_permute(Tensor x, Tensor experts, int64_t num_experts) {
    const Operator op("moe_permute");
    check_rows(op, x, "x");
    check_rows(op, experts, "experts");
    const ScalarType ids = experts.scalar_type();
    op.check(ids == ScalarType::Int || ids == ScalarType::Long, "experts must be Int or Long, not ", ids);
    op.check_same_device(experts, "experts", x, "x");
    op.check(experts.size(0) == x.size(0) && experts.size(1) > 0, "experts must be [T = ", x.size(0), ", k > 0]");
    op.check(num_experts > 0 && num_experts <= 1024, "num_experts must be 1 to 1024, not ", num_experts);
    const int64_t tokens = x.size(0), choices = experts.size(1), slots = tokens * choices;
    const int dtype = op.dtype_of(x, "x");
    const DeviceGuard guard(x);
    Tensor rows = new_tensor(x, {slots, x.size(1)}, x.scalar_type()), order = new_tensor(x, {slots}, ScalarType::Long);
    Tensor place = new_tensor(x, {tokens, choices}, ScalarType::Int);
    Tensor counts = new_tensor(x, {num_experts}, ScalarType::Long);
    Tensor scratch = new_tensor(x, {megapt_moe_scratch(slots, num_experts)}, ScalarType::Int);
    auto* at = static_cast<int64_t*>(order.data_ptr());
    auto* places = static_cast<int*>(place.data_ptr());
    op.check_launch(megapt_moe_sort(experts.data_ptr(), ids == ScalarType::Int ? 4 : 8, slots, num_experts,
                                    static_cast<int*>(scratch.data_ptr()), at, places,
                                    static_cast<int64_t*>(counts.data_ptr()), current_stream(x)));
    op.check_launch(megapt_moe_spread(x.data_ptr(), places, at, rows.data_ptr(), tokens, choices, x.size(1), dtype,
                                      current_stream(x)));
    return {rows, order, place, counts};
}

// Sums of rows [slots, H] by `place` [T, k], with weights or without.
Tensor gather(const Operator& op, const Tensor& rows, const Tensor& place, const float* weights) {
    const int dtype = op.dtype_of(rows, "rows");
    Tensor y = new_tensor(rows, {place.size(0), rows.size(1)}, rows.scalar_type());
    op.check_launch(megapt_moe_gather(rows.data_ptr(), static_cast<const int*>(place.data_ptr()), weights, y.data_ptr(),
                                      place.size(0), place.size(1), rows.size(1), dtype, current_stream(rows)));
    return y;
}

Tensor moe_sum(Tensor rows, Tensor place) {
    const Operator op("moe_sum");
    check_rows(op, rows, "rows");
    op.check(place.dim() == 2 && place.numel() == rows.size(0), "place must be [T, k] with T k = ", rows.size(0));
    data<int>(op, place, "place", ScalarType::Int, rows);
    const DeviceGuard guard(rows);
    return gather(op, rows, place, nullptr);
}

std::tuple<Tensor, Tensor> moe_unpermute(Tensor rows, Tensor order, Tensor weights) {
    const Operator op("moe_unpermute");
    check_rows(op, rows, "rows");
    const int64_t slots = rows.size(0);
    op.check_shape(order, "order", {slots});
    op.check(weights.dim() == 2 && weights.numel() == slots && weights.size(1) > 0,
             "weights must be [T, k > 0] with T k = ", slots);
    const auto* at = data<int64_t>(op, order, "order", ScalarType::Long, rows);
    const auto* weight = data<float>(op, weights, "weights", ScalarType::Float, rows);
    const DeviceGuard guard(rows);
    Tensor place = new_tensor(rows, {weights.size(0), weights.size(1)}, ScalarType::Int);
    torch::stable::fill_(place, -1.);
    op.check_launch(megapt_moe_invert(at, slots, static_cast<int*>(place.data_ptr()), current_stream(rows)));
    return {gather(op, rows, place, weight), place};
}

std::tuple<Tensor, Tensor> moe_unpermute_backward(Tensor dy, Tensor rows, Tensor order, Tensor place, Tensor weights) {
    const Operator op("moe_unpermute_backward");
    check_rows(op, dy, "dy");
    check_rows(op, rows, "rows");
    op.check(weights.dim() == 2 && weights.numel() == rows.size(0), "weights must be [T, k] with T k = ", rows.size(0));
    op.check_shape(dy, "dy", {weights.size(0), rows.size(1)});
    op.check_same_dtype(dy, "dy", rows, "rows");
    op.check_same_device(dy, "dy", rows, "rows");
    op.check_shape(order, "order", {rows.size(0)});
    op.check_shape(place, "place", {weights.size(0), weights.size(1)});
    const auto* at = data<int64_t>(op, order, "order", ScalarType::Long, rows);
    const auto* places = data<int>(op, place, "place", ScalarType::Int, rows);
    const auto* weight = data<float>(op, weights, "weights", ScalarType::Float, rows);
    const int dtype = op.dtype_of(rows, "rows");
    const DeviceGuard guard(rows);
    Tensor drows = torch::stable::empty_like(rows), dweights = torch::stable::empty_like(weights);
    if (rows.size(1) == 0) torch::stable::zero_(dweights);
    op.check_launch(megapt_moe_gather_backward(dy.data_ptr(), rows.data_ptr(), at, places, weight, drows.data_ptr(),
                                               static_cast<float*>(dweights.data_ptr()), weights.size(0),
                                               weights.size(1), rows.size(1), dtype, current_stream(rows)));
    return {drows, dweights};
}

}  // namespace

MEGAPT_LIBRARY_FRAGMENT(m) {
    m.def("moe_permute(Tensor x, Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("moe_sum(Tensor rows, Tensor place) -> Tensor");
    m.def("moe_unpermute(Tensor rows, Tensor order, Tensor weights) -> (Tensor, Tensor)");
    m.def(
        "moe_unpermute_backward(Tensor dy, Tensor rows, Tensor order, Tensor place, Tensor weights) -> (Tensor, "
        "Tensor)");
}

MEGAPT_LIBRARY_IMPL(m) {
    m.impl("moe_permute", TORCH_BOX(&moe_permute));
    m.impl("moe_sum", TORCH_BOX(&moe_sum));
    m.impl("moe_unpermute", TORCH_BOX(&moe_unpermute));
    m.impl("moe_unpermute_backward", TORCH_BOX(&moe_unpermute_backward));
}
