// Operators over flash.h: attention of tokens [T, heads, width] by documents, and its gradients.
#include "flash.h"

#include "bindings.h"

namespace megapt {
namespace {

void check_heads(const Operator& op, const Tensor& x, const char* argument, const Tensor& q) {
    op.check(x.dim() == 3, argument, " must have three dimensions, not ", x.dim());
    op.check(x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0, argument,
             " must be contiguous in its last dimension and have other strides that are multiples of 8");
    op.check_aligned(x, argument);
    op.check_same_dtype(x, argument, q, "q");
    op.check_same_device(x, argument, q, "q");
}

// The dtype's number.
int check_call(const Operator& op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts,
               const Tensor& ends, int64_t window) {
    const int dtype = op.dtype_of(q, "q");
    op.check(dtype != kFloat32, "q must be BFloat16 or Half, not Float");
    check_heads(op, q, "q", q);
    check_heads(op, k, "k", q);
    check_heads(op, v, "v", q);
    const int64_t tokens = q.size(0), heads = q.size(1), width = q.size(2), kv_heads = k.size(1);
    op.check(width == 64 || width == 128, "q must have heads of width 64 or 128, not ", width);
    op.check(heads > 0 && heads <= 65535 && kv_heads > 0 && heads % kv_heads == 0,
             "q must have a multiple of k's heads and at most 65535, not ", heads, " with ", kv_heads);
    op.check(tokens < INT32_MAX - 65536, "q must have fewer than ", INT32_MAX - 65536, " tokens, not ", tokens);
    op.check_shape(k, "k", {tokens, kv_heads, width});
    op.check_shape(v, "v", {tokens, kv_heads, width});
    for (const auto& [bounds, name] : {std::make_pair(&starts, "starts"), std::make_pair(&ends, "ends")}) {
        op.check_dtype(*bounds, name, ScalarType::Int);
        op.check_contiguous(*bounds, name);
        op.check_shape(*bounds, name, {tokens});
        op.check_same_device(*bounds, name, q, "q");
    }
    op.check(window >= 0, "window must be 0 or positive, not ", window);
    return dtype;
}

std::tuple<Tensor, Tensor> flash(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts,
                                 const Tensor& ends, bool causal, int64_t window, double scale, double softcap) {
    const Operator op("flash");
    const int dtype = check_call(op, q, k, v, starts, ends, window);
    const int64_t tokens = q.size(0), heads = q.size(1), width = q.size(2);
    const DeviceGuard guard(q);
    const std::vector<int64_t> shape = {tokens, heads, width}, rows = {heads, tokens};
    Tensor out = torch::stable::new_empty(q, shape);
    Tensor lse = torch::stable::new_empty(q, rows, ScalarType::Float);
    op.check_launch(megapt_flash(q.data_ptr(), q.stride(0), q.stride(1), k.data_ptr(), k.stride(0), k.stride(1),
                                 v.data_ptr(), v.stride(0), v.stride(1), starts.data_ptr(), ends.data_ptr(),
                                 out.data_ptr(), lse.data_ptr(), tokens, heads, k.size(1), width, causal, window,
                                 scale, softcap, dtype, current_stream(q)));
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& starts, const Tensor& ends, const Tensor& out,
                                                  const Tensor& lse, bool causal, int64_t window, double scale,
                                                  double softcap) {
    const Operator op("flash_backward");
    const int dtype = check_call(op, q, k, v, starts, ends, window);
    const int64_t tokens = q.size(0), heads = q.size(1), width = q.size(2), kv_heads = k.size(1);
    check_heads(op, dy, "dy", q);
    op.check_shape(dy, "dy", {tokens, heads, width});
    op.check_contiguous(out, "out");
    op.check_shape(out, "out", {tokens, heads, width});
    op.check_same_dtype(out, "out", q, "q");
    op.check_same_device(out, "out", q, "q");
    op.check_contiguous(lse, "lse");
    op.check_shape(lse, "lse", {heads, tokens});
    op.check_dtype(lse, "lse", ScalarType::Float);
    op.check_same_device(lse, "lse", q, "q");
    const DeviceGuard guard(q);
    const std::vector<int64_t> shape = {tokens, heads, width}, kv_shape = {tokens, kv_heads, width};
    const std::vector<int64_t> rows = {heads, tokens};
    Tensor dq = torch::stable::new_empty(q, shape);
    Tensor dk = torch::stable::new_empty(q, kv_shape), dv = torch::stable::new_empty(q, kv_shape);
    Tensor along = torch::stable::new_empty(q, rows, ScalarType::Float);
    op.check_launch(megapt_flash_backward(
        dy.data_ptr(), dy.stride(0), dy.stride(1), q.data_ptr(), q.stride(0), q.stride(1), k.data_ptr(), k.stride(0),
        k.stride(1), v.data_ptr(), v.stride(0), v.stride(1), starts.data_ptr(), ends.data_ptr(), out.data_ptr(),
        lse.data_ptr(), along.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), tokens, heads, kv_heads, width,
        causal, window, scale, softcap, dtype, current_stream(q)));
    return {dq, dk, dv};
}

}  // namespace
}  // namespace megapt

MEGAPT_LIBRARY_FRAGMENT(m) {
    m.def(
        "flash(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor ends, bool causal, int window, float scale, "
        "float softcap) -> (Tensor, Tensor)");
    m.def(
        "flash_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor starts, Tensor ends, Tensor out, Tensor lse, "
        "bool causal, int window, float scale, float softcap) -> (Tensor, Tensor, Tensor)");
}

MEGAPT_LIBRARY_IMPL(m) {
    m.impl("flash", TORCH_BOX(&megapt::flash));
    m.impl("flash_backward", TORCH_BOX(&megapt::flash_backward));
}
