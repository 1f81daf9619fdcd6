// Bindings of cross entropy over a rank's columns of the logits.
#include "bindings.h"
#include "cross_entropy.h"

namespace megapt {
namespace {

struct Rows {
    int64_t rows, columns, stride;
    int dtype;
};

// What both kernels read: logits [rows, columns] with neighbouring columns, target [rows].
Rows rows_of(const Operator& op, const Tensor& logits, const Tensor& target, int64_t length, double softcap) {
    op.check(logits.dim() == 2, "logits must have two dimensions, not ", logits.dim());
    const int64_t rows = logits.size(0), columns = logits.size(1);
    op.check(columns < INT32_MAX, "logits must have fewer than 2^31 - 1 columns, not ", columns);
    op.check(rows <= INT32_MAX, "logits must have fewer than 2^31 rows, not ", rows);
    op.check(columns <= 1 || logits.stride(1) == 1, "logits must have neighbouring columns, not stride ",
             logits.stride(1));
    op.check(rows <= 1 || logits.stride(0) >= columns, "logits must have rows that lie apart, not stride ",
             logits.stride(0), " for ", columns, " columns");
    op.check_shape(target, "target", {rows});
    op.check_dtype(target, "target", ScalarType::Long);
    op.check_contiguous(target, "target");
    op.check_same_device(target, "target", logits, "logits");
    op.check(length >= 0 && length <= columns, "length must be from 0 to ", columns, ", not ", length);
    op.check(softcap >= 0, "softcap must be 0 or more, not ", softcap);
    return {rows, columns, rows > 1 ? logits.stride(0) : columns, op.dtype_of(logits, "logits")};
}

Tensor cross_entropy_stats(const Tensor& logits, const Tensor& target, int64_t start, int64_t length,
                           int64_t ignore_index, double softcap) {
    const Operator op("cross_entropy_stats");
    const Rows of = rows_of(op, logits, target, length, softcap);
    const DeviceGuard guard(logits);
    Tensor stats = torch::stable::new_empty(logits, {3, of.rows}, ScalarType::Float);
    op.check_launch(megapt_cross_entropy_stats(
        logits.data_ptr(), static_cast<const int64_t*>(target.data_ptr()), static_cast<float*>(stats.data_ptr()),
        of.rows, of.columns, of.stride, start, length, ignore_index, static_cast<float>(softcap), of.dtype,
        current_stream(logits)));
    return stats;
}

std::tuple<Tensor, Tensor> cross_entropy_combine(const Tensor& every, const Tensor& target, int64_t ignore_index,
                                                 double z_loss) {
    const Operator op("cross_entropy_combine");
    op.check(every.dim() == 3, "every must have three dimensions, not ", every.dim());
    const int64_t ranks = every.size(0), rows = every.size(2);
    op.check_shape(every, "every", {ranks, 3, rows});
    op.check(ranks > 0, "every must have at least one rank");
    op.check_dtype(every, "every", ScalarType::Float);
    op.check_contiguous(every, "every");
    op.check_shape(target, "target", {rows});
    op.check_dtype(target, "target", ScalarType::Long);
    op.check_contiguous(target, "target");
    op.check_same_device(target, "target", every, "every");
    const DeviceGuard guard(every);
    Tensor losses = torch::stable::new_empty(every, {rows}, ScalarType::Float);
    Tensor tokens = torch::stable::new_empty(every, {4, rows}, ScalarType::Float);
    op.check_launch(megapt_cross_entropy_combine(
        static_cast<const float*>(every.data_ptr()), static_cast<const int64_t*>(target.data_ptr()),
        static_cast<float*>(losses.data_ptr()), static_cast<float*>(tokens.data_ptr()), ranks, rows, ignore_index,
        static_cast<float>(z_loss), current_stream(every)));
    return {losses, tokens};
}

void cross_entropy_gradient_(const Tensor& logits, const Tensor& target, const Tensor& tokens,
                             const std::optional<Tensor>& slope, int64_t start, int64_t length, int64_t ignore_index,
                             double softcap) {
    const Operator op("cross_entropy_gradient_");
    const Rows of = rows_of(op, logits, target, length, softcap);
    op.check_shape(tokens, "tokens", {4, of.rows});
    op.check_dtype(tokens, "tokens", ScalarType::Float);
    op.check(of.rows <= 1 || tokens.stride(1) == 1, "tokens must have neighbouring columns, not stride ",
             tokens.stride(1));
    op.check_same_device(tokens, "tokens", logits, "logits");
    const float* slopes = nullptr;
    int64_t slope_stride = 0;
    if (slope) {
        op.check_shape(*slope, "slope", {of.rows});
        op.check_dtype(*slope, "slope", ScalarType::Float);
        op.check_same_device(*slope, "slope", logits, "logits");
        slopes = static_cast<const float*>(slope->data_ptr());
        slope_stride = slope->stride(0);  // 0 where a sum's gradient was spread
    }
    const DeviceGuard guard(logits);
    op.check_launch(megapt_cross_entropy_gradient(
        logits.data_ptr(), static_cast<const int64_t*>(target.data_ptr()), static_cast<const float*>(tokens.data_ptr()),
        tokens.stride(0), slopes, slope_stride, of.rows, of.columns, of.stride, start, length, ignore_index,
        static_cast<float>(softcap), of.dtype, current_stream(logits)));
}

}  // namespace
}  // namespace megapt

MEGAPT_LIBRARY_FRAGMENT(m) {
    m.def("cross_entropy_stats(Tensor logits, Tensor target, int start, int length, int ignore_index, float softcap) -> Tensor");
    m.def("cross_entropy_combine(Tensor every, Tensor target, int ignore_index, float z_loss) -> (Tensor, Tensor)");
    m.def("cross_entropy_gradient_(Tensor(a!) logits, Tensor target, Tensor tokens, Tensor? slope, int start, int length, "
          "int ignore_index, float softcap) -> ()");
}

MEGAPT_LIBRARY_IMPL(m) {
    m.impl("cross_entropy_stats", TORCH_BOX(&megapt::cross_entropy_stats));
    m.impl("cross_entropy_combine", TORCH_BOX(&megapt::cross_entropy_combine));
    m.impl("cross_entropy_gradient_", TORCH_BOX(&megapt::cross_entropy_gradient_));
}
