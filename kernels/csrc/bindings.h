// What bindings (NAME_ops.cpp) share: checks, streams and registration, by torch's stable ABI of 2.10 alone, so that one
// library serves every torch since. No CUDA header: the same file serves the emulated library, whose tensors are the CPU's.
//
//   MEGAPT_LIBRARY_FRAGMENT(m) { m.def("scale(Tensor x, float by) -> Tensor"); }
//   MEGAPT_LIBRARY_IMPL(m) { m.impl("scale", TORCH_BOX(&scale)); }
//
//   Tensor scale(const Tensor& x, double by) {
//       const Operator op("scale");
//       op.check_contiguous(x, "x");
//       const int dtype = op.dtype_of(x, "x");
//       const DeviceGuard guard(x);
//       Tensor y = torch::stable::empty_like(x);
//       op.check_launch(megapt_scale(x.data_ptr(), by, y.data_ptr(), x.numel(), dtype, current_stream(x)));
//       return y;
//   }
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "library.h"

#define MEGAPT_LIBRARY_FRAGMENT(m) STABLE_TORCH_LIBRARY_FRAGMENT(megapt_kernels, m)
#if defined(MEGAPT_EMULATED)
#define MEGAPT_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(megapt_kernels, CPU, m)
#else
#define MEGAPT_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(megapt_kernels, CUDA, m)
#endif

namespace megapt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As common.cuh numbers them.
constexpr int kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2;

// Makes the tensor's GPU the current one, for kernels are launched on that: a process may drive several.
class DeviceGuard {
public:
#if defined(MEGAPT_EMULATED)
    explicit DeviceGuard(const Tensor&) {}
#else
    explicit DeviceGuard(const Tensor& x) : guard_(x.get_device_index()) {}

private:
    torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// PyTorch's current stream on the tensor's device.
inline void* current_stream(const Tensor& x) {
#if defined(MEGAPT_EMULATED)
    (void)x;
    return nullptr;
#else
    return megapt_current_stream(x.get_device_index());
#endif
}

// An operator by name: checks of its arguments, which raise a RuntimeError naming both.
class Operator {
public:
    explicit Operator(const char* name) : name_(name) {}

    template <class... Parts>
    void check(bool holds, const Parts&... parts) const {
        if (!holds) fail(parts...);
    }

    template <class... Parts>
    [[noreturn]] void fail(const Parts&... parts) const {
        std::ostringstream message;
        message << "megapt_kernels::" << name_ << ": ";
        (message << ... << parts);
        throw std::runtime_error(message.str());
    }

    void check_contiguous(const Tensor& x, const char* argument) const {
        check(x.is_contiguous(), argument, " must be contiguous, not strided ", shown(x.strides()), " for shape ",
              shown(x.sizes()));
    }

    void check_dtype(const Tensor& x, const char* argument, ScalarType dtype) const {
        check(x.scalar_type() == dtype, argument, " must be ", dtype, ", not ", x.scalar_type());
    }

    void check_same_dtype(const Tensor& x, const char* argument, const Tensor& like, const char* other) const {
        check(x.scalar_type() == like.scalar_type(), argument, " must have the dtype of ", other, ", ",
              like.scalar_type(), ", not ", x.scalar_type());
    }

    void check_same_device(const Tensor& x, const char* argument, const Tensor& like, const char* other) const {
        check(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), argument,
              " must be on the device of ", other);
    }

    void check_shape(const Tensor& x, const char* argument, std::initializer_list<int64_t> shape) const {
        const auto sizes = x.sizes();
        bool same = sizes.size() == shape.size();
        for (size_t d = 0; same && d < shape.size(); ++d) same = sizes[d] == shape.begin()[d];
        check(same, argument, " must have shape ", shown(shape), ", not ", shown(sizes));
    }

    // The address must be a multiple of `bytes`; of an empty tensor it is never read.
    void check_aligned(const Tensor& x, const char* argument, int bytes = 16) const {
        check(x.numel() == 0 || reinterpret_cast<uintptr_t>(x.data_ptr()) % bytes == 0, argument,
              " must begin at a multiple of ", bytes, " bytes");
    }

    // What the launchers call the dtype; an error for others than fp32, bf16 and fp16.
    int dtype_of(const Tensor& x, const char* argument) const {
        switch (x.scalar_type()) {
            case ScalarType::Float: return kFloat32;
            case ScalarType::BFloat16: return kBFloat16;
            case ScalarType::Half: return kFloat16;
            default: fail(argument, " must be Float, BFloat16 or Half, not ", x.scalar_type());
        }
    }

    // code: what a launcher returned, 0 for success.
    void check_launch(int code) const {
        if (code != 0) fail("the launch failed, or a kernel before it: ", megapt_launch_error(code));
    }

private:
    const char* name_;

    template <class Numbers>
    static std::string shown(const Numbers& numbers) {
        std::ostringstream text;
        text << '[';
        for (size_t i = 0; i < numbers.size(); ++i) text << (i ? ", " : "") << numbers.begin()[i];
        text << ']';
        return text.str();
    }
};

inline void check_launch(int code, const char* op) { Operator(op).check_launch(code); }

}  // namespace megapt
