// What the library says of itself, and what bindings need of CUDA.
#include "library.h"

#if !defined(MEGAPT_EMULATED)
#include <dlfcn.h>

#include <stdexcept>
#endif

#if !defined(MEGAPT_DESCRIPTION)
#error "MEGAPT_DESCRIPTION comes from build.py"
#endif

// library.py finds this text in the file before it loads it: loading registers operators, which cannot be taken back.
const char* megapt_kernels_description() { return "megapt_kernels library: " MEGAPT_DESCRIPTION; }

#if defined(MEGAPT_EMULATED)

extern "C" const char* megapt_emulator_error();

const char* megapt_launch_error(int) { return megapt_emulator_error(); }

void* megapt_current_stream(int32_t) { return nullptr; }

#else

extern "C" const char* cudaGetErrorString(int);  // of the CUDA runtime in this library

const char* megapt_launch_error(int code) { return cudaGetErrorString(code); }

namespace {

using GetStream = int32_t (*)(int32_t, void**);

// Found when it is needed, for a torch without CUDA does not have it and must load the library all the same. torch loads
// its own libraries privately, so that the process's global symbols need not hold it.
GetStream find_get_stream() {
    const char* name = "aoti_torch_get_current_cuda_stream";
    if (void* found = dlsym(RTLD_DEFAULT, name)) return reinterpret_cast<GetStream>(found);
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<GetStream>(dlsym(torch_cuda, name)) : nullptr;
}

}  // namespace

void* megapt_current_stream(int32_t index) {
    static const GetStream get_stream = find_get_stream();
    if (!get_stream) throw std::runtime_error("megapt_kernels: this torch has no CUDA");
    void* stream = nullptr;
    if (get_stream(index, &stream) != 0) throw std::runtime_error("megapt_kernels: no current stream on this device");
    return stream;
}

#endif
