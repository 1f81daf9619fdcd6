// What g++ and clang call where code compiled with
//   -fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero
// does what the language leaves undefined: in a kernel it ends the launch, in a launcher it fails the next one. A GPU
// refuses misaligned vectors, and takes the rest silently.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt_launch.h"

namespace megapt {
namespace emulator __attribute__((visibility("hidden"))) {
namespace checks {

// The compilers' layout of what their checks hand over begins with the place; that of an alignment goes on.
struct Place {
    const char* file;
    uint32_t line, column;
};
struct Alignment {
    Place place;
    const void* type;
    unsigned char log2;
    unsigned char kind;
};

inline void fail(const Place& place, int code, const std::string& what) {
    const std::string said = what + text(" (%s:%u)", place.file, place.line);
    if (machine().inside()) machine().fail(code, said);
    if (state().launcher.empty()) state().launcher = said;
}

}  // namespace checks
}  // namespace emulator
}  // namespace megapt

#define MEGAPT_HANDLER extern "C" __attribute__((weak, visibility("hidden"))) void

MEGAPT_HANDLER __ubsan_handle_type_mismatch_v1(megapt::emulator::checks::Alignment* data, size_t address) {
    using namespace megapt::emulator;
    checks::fail(data->place, kMisalignedAddress,
                 text("access of address 0x%zx, which is no multiple of %u", address, 1u << data->log2));
}
MEGAPT_HANDLER __ubsan_handle_out_of_bounds(megapt::emulator::checks::Place* place, size_t index) {
    using namespace megapt::emulator;
    checks::fail(*place, kIllegalAddress, text("index %zd is outside of the array", index));
}
MEGAPT_HANDLER __ubsan_handle_divrem_overflow(megapt::emulator::checks::Place* place, size_t, size_t) {
    using namespace megapt::emulator;
    checks::fail(*place, kLaunchFailure, "integer division by zero, or overflow");
}
#define MEGAPT_OVERFLOW(name, what)                                                                      \
    MEGAPT_HANDLER __ubsan_handle_##name(megapt::emulator::checks::Place* place, size_t, size_t) {        \
        megapt::emulator::checks::fail(*place, megapt::emulator::kLaunchFailure, what);                   \
    }
MEGAPT_OVERFLOW(add_overflow, "signed overflow of an addition")
MEGAPT_OVERFLOW(sub_overflow, "signed overflow of a subtraction")
MEGAPT_OVERFLOW(mul_overflow, "signed overflow of a multiplication")
MEGAPT_OVERFLOW(negate_overflow, "signed overflow of a negation")
MEGAPT_OVERFLOW(shift_out_of_bounds, "a shift by too much, or of a negative number")
#undef MEGAPT_OVERFLOW
#undef MEGAPT_HANDLER
