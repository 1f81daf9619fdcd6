// What the library says of itself, and what bindings need of CUDA (library_ops.cpp, library.cu).
#pragma once

#include <cstdint>

extern "C" {
// The sources, compilers and architectures that it was built of, as library.py reads them.
__attribute__((visibility("default"))) const char* megapt_kernels_description();

// PyTorch's current stream on CUDA device `index`; throws where the running torch has no CUDA.
void* megapt_current_stream(int32_t index);

// A launcher's code in words.
const char* megapt_launch_error(int code);
}
