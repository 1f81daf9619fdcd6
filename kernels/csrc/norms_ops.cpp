// Operators over norms.h: rows [T, H] whose elements are contiguous, at any distance.
#include "norms.h"

#include "bindings.h"

namespace megapt {
namespace {

using Maybe = std::optional<Tensor>;

void check_rows(const Operator& op, const Tensor& x, const char* argument, const Tensor& like, const char* other) {
    op.check(x.dim() == 2, argument, " must have two dimensions, not ", x.dim());
    op.check_shape(x, argument, {like.size(0), like.size(1)});
    op.check_same_dtype(x, argument, like, other);
    op.check_same_device(x, argument, like, other);
    op.check(x.size(1) == 1 || x.stride(1) == 1, argument, " must have rows of contiguous elements, not a stride of ",
             x.stride(1));
}

// Weight or bias: contiguous, in fp32 or x's dtype. Returns what launchers call the dtype.
int check_weight(const Operator& op, const Tensor& w, const char* argument, const Tensor& x) {
    op.check_shape(w, argument, {x.size(1)});
    op.check_contiguous(w, argument);
    op.check_same_device(w, argument, x, "x");
    op.check(w.scalar_type() == x.scalar_type() || w.scalar_type() == ScalarType::Float, argument, " must be Float or ",
             x.scalar_type(), ", not ", w.scalar_type());
    return op.dtype_of(w, argument);
}

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(like, shape, dtype);
}

void* data(const Maybe& x) { return x ? x->data_ptr() : nullptr; }
float* floats(const Maybe& x) { return static_cast<float*>(data(x)); }

struct Normed {
    Tensor y;
    Maybe sum, mean;
    Tensor rstd;
};

Normed norm(const char* name, const Tensor& x, const Maybe& residual, const Tensor& weight, const Maybe& bias,
            double eps, double offset) {
    const Operator op(name);
    check_rows(op, x, "x", x, "x");
    if (residual) check_rows(op, *residual, "residual", x, "x");
    const int dtype = op.dtype_of(x, "x"), weight_dtype = check_weight(op, weight, "weight", x);
    if (bias) {
        check_weight(op, *bias, "bias", x);
        op.check_same_dtype(*bias, "bias", weight, "weight");
    }
    const int64_t rows = x.size(0), width = x.size(1);
    op.check(width > 0 && rows <= INT32_MAX, "x must have at most 2^31 - 1 rows of at least one element");
    const DeviceGuard guard(x);
    Normed out{empty(x, {rows, width}, x.scalar_type()), {}, {}, empty(x, {rows}, ScalarType::Float)};
    if (residual) out.sum = empty(x, {rows, width}, x.scalar_type());
    if (bias) out.mean = empty(x, {rows}, ScalarType::Float);
    op.check_launch(megapt_norm(x.data_ptr(), x.stride(0), data(residual), residual ? residual->stride(0) : 0,
                                weight.data_ptr(), data(bias), static_cast<float>(offset), static_cast<float>(eps),
                                out.y.data_ptr(), data(out.sum), floats(out.mean), floats(out.rstd), rows, width, dtype,
                                weight_dtype, current_stream(x)));
    return out;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
    Normed out = norm("rms_norm", x, {}, weight, {}, eps, offset);
    return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, double offset) {
    Normed out = norm("add_rms_norm", x, residual, weight, {}, eps, offset);
    return {out.y, *out.sum, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
    Normed out = norm("layer_norm", x, {}, weight, bias, eps, 0);
    return {out.y, *out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                          const Tensor& bias, double eps) {
    Normed out = norm("add_layer_norm", x, residual, weight, bias, eps, 0);
    return {out.y, *out.sum, *out.mean, out.rstd};
}

struct Gradients {
    Tensor dx, dw;
    Maybe db;
};

Gradients backward(const char* name, const Tensor& dy, const Maybe& ds, const Tensor& s, const Tensor& weight,
                   const Maybe& mean, const Tensor& rstd, double offset) {
    const Operator op(name);
    check_rows(op, s, "s", s, "s");
    check_rows(op, dy, "dy", s, "s");
    if (ds) check_rows(op, *ds, "ds", s, "s");
    const int dtype = op.dtype_of(s, "s"), weight_dtype = check_weight(op, weight, "weight", s);
    const int64_t rows = s.size(0), width = s.size(1);
    for (const Tensor* t : {&rstd, mean ? &*mean : &rstd}) {
        const char* argument = t == &rstd ? "rstd" : "mean";
        op.check_shape(*t, argument, {rows});
        op.check_contiguous(*t, argument);
        op.check_dtype(*t, argument, ScalarType::Float);
        op.check_same_device(*t, argument, s, "s");
    }
    op.check(width > 0 && rows <= INT32_MAX, "s must have at most 2^31 - 1 rows of at least one element");
    const DeviceGuard guard(s);
    const int64_t blocks = megapt_norm_backward_blocks(rows, width, dtype);
    Tensor partial = empty(s, {mean ? 2 : 1, blocks, width}, ScalarType::Float);
    Gradients out{empty(s, {rows, width}, s.scalar_type()), empty(s, {width}, weight.scalar_type()), {}};
    if (mean) out.db = empty(s, {width}, weight.scalar_type());
    op.check_launch(megapt_norm_backward(
        dy.data_ptr(), dy.stride(0), data(ds), ds ? ds->stride(0) : 0, s.data_ptr(), s.stride(0), weight.data_ptr(),
        static_cast<float>(offset), floats(mean), floats(rstd), out.dx.data_ptr(), out.dw.data_ptr(), data(out.db),
        floats(partial), blocks, rows, width, dtype, weight_dtype, current_stream(s)));
    return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Maybe& ds, const Tensor& s, const Tensor& weight,
                                             const Tensor& rstd, double offset) {
    Gradients out = backward("rms_norm_backward", dy, ds, s, weight, {}, rstd, offset);
    return {out.dx, out.dw};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Maybe& ds, const Tensor& s,
                                                       const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
    Gradients out = backward("layer_norm_backward", dy, ds, s, weight, mean, rstd, 0);
    return {out.dx, out.dw, *out.db};
}

}  // namespace
}  // namespace megapt

MEGAPT_LIBRARY_FRAGMENT(m) {
    m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor y, Tensor rstd)");
    m.def(
        "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> "
        "(Tensor y, Tensor sum, Tensor rstd)");
    m.def(
        "rms_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor rstd, float offset) -> "
        "(Tensor dx, Tensor dw)");
    m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
    m.def(
        "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> "
        "(Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
    m.def(
        "layer_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd) -> "
        "(Tensor dx, Tensor dw, Tensor db)");
}

MEGAPT_LIBRARY_IMPL(m) {
    m.impl("rms_norm", TORCH_BOX(&megapt::rms_norm));
    m.impl("add_rms_norm", TORCH_BOX(&megapt::add_rms_norm));
    m.impl("rms_norm_backward", TORCH_BOX(&megapt::rms_norm_backward));
    m.impl("layer_norm", TORCH_BOX(&megapt::layer_norm));
    m.impl("add_layer_norm", TORCH_BOX(&megapt::add_layer_norm));
    m.impl("layer_norm_backward", TORCH_BOX(&megapt::layer_norm_backward));
}
