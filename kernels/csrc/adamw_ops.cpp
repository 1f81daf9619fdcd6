// adamw_step_ and squared_norm as torch operators.
#include "adamw.h"
#include "bindings.h"

namespace {

using namespace megapt;

// Tensors of a list after checks: contiguous fp32 on the first's device, of its sizes where `sizes` is given.
std::vector<float*> flat(const Operator& op, const std::vector<Tensor>& tensors, const char* argument,
                         const Tensor& first, const std::vector<int64_t>* sizes) {
    std::vector<float*> found;
    found.reserve(tensors.size());
    for (const Tensor& t : tensors) {
        op.check_contiguous(t, argument);
        op.check_dtype(t, argument, ScalarType::Float);
        op.check_same_device(t, argument, first, "the first");
        op.check(!sizes || t.numel() == (*sizes)[found.size()], argument, " must have the sizes of masters");
        found.push_back(static_cast<float*>(t.data_ptr()));
    }
    return found;
}

std::vector<int64_t> sizes_of(const std::vector<Tensor>& tensors) {
    std::vector<int64_t> sizes;
    for (const Tensor& t : tensors) sizes.push_back(t.numel());
    return sizes;
}

const float* scalar(const Operator& op, const Tensor& t, const char* argument, const Tensor& first) {
    op.check_dtype(t, argument, ScalarType::Float);
    op.check(t.numel() == 1, argument, " must be a scalar");
    op.check_same_device(t, argument, first, "masters");
    return static_cast<const float*>(t.data_ptr());
}

void adamw_step_(std::vector<Tensor> masters, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                 std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> weights, std::vector<double> rates,
                 std::vector<double> decays, double beta1, double beta2, double eps, Tensor step, Tensor scale,
                 Tensor skip) {
    const Operator op("adamw_step_");
    const size_t shards = masters.size();
    if (shards == 0) return;
    op.check(grads.size() == shards && exp_avgs.size() == shards && exp_avg_sqs.size() == shards &&
                 (weights.empty() || weights.size() == shards) && rates.size() == shards && decays.size() == shards,
             "the lists must have an entry for each of ", shards, " masters (weights: or none)");
    const Tensor& first = masters[0];
    const std::vector<int64_t> sizes = sizes_of(masters);
    const auto master = flat(op, masters, "masters", first, nullptr);
    const auto grad = flat(op, grads, "grads", first, &sizes);
    const auto exp_avg = flat(op, exp_avgs, "exp_avgs", first, &sizes);
    const auto exp_avg_sq = flat(op, exp_avg_sqs, "exp_avg_sqs", first, &sizes);
    std::vector<void*> weight;
    for (const Tensor& w : weights) {
        op.check_contiguous(w, "weights");
        op.check_same_dtype(w, "weights", weights[0], "the first");
        op.check_same_device(w, "weights", first, "masters");
        op.check(w.numel() == sizes[weight.size()], "weights must have the sizes of masters");
        weight.push_back(w.data_ptr());
    }
    const int dtype = weights.empty() ? kFloat32 : op.dtype_of(weights[0], "weights");
    op.check(weights.empty() || dtype != kFloat32, "weights must be BFloat16 or Half, not Float");
    const DeviceGuard guard(first);
    op.check_launch(megapt_adamw_step(static_cast<int64_t>(shards), master.data(), grad.data(), exp_avg.data(),
                                      exp_avg_sq.data(), weights.empty() ? nullptr : weight.data(), sizes.data(),
                                      rates.data(), decays.data(), beta1, beta2, eps, scalar(op, step, "step", first),
                                      scalar(op, scale, "scale", first), scalar(op, skip, "skip", first), dtype,
                                      current_stream(first)));
}

Tensor squared_norm(std::vector<Tensor> tensors) {
    const Operator op("squared_norm");
    op.check(!tensors.empty(), "tensors must not be empty");
    const std::vector<int64_t> sizes = sizes_of(tensors);
    const auto data = flat(op, tensors, "tensors", tensors[0], nullptr);
    const int64_t count = static_cast<int64_t>(tensors.size());
    const DeviceGuard guard(tensors[0]);
    Tensor partials =
        torch::stable::new_empty(tensors[0], {megapt_squared_norm_partials(count, sizes.data())}, ScalarType::Double);
    Tensor out = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
    op.check_launch(megapt_squared_norm(count, data.data(), sizes.data(), static_cast<double*>(partials.data_ptr()),
                                        static_cast<double*>(out.data_ptr()), current_stream(tensors[0])));
    return out;
}

}  // namespace

MEGAPT_LIBRARY_FRAGMENT(m) {
    m.def(
        "adamw_step_(Tensor(a!)[] masters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] weights, float[] rates, float[] decays, float beta1, float beta2, float eps, Tensor step, "
        "Tensor scale, Tensor skip) -> ()");
    m.def("squared_norm(Tensor[] tensors) -> Tensor");
}

MEGAPT_LIBRARY_IMPL(m) {
    m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
    m.impl("squared_norm", TORCH_BOX(&squared_norm));
}
