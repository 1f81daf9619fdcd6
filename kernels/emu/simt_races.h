// The race detector's side that the emulator calls. It is there where the sources are compiled with
// -fsanitize=thread -DMEGAPT_EMULATOR_RACES, and simt_races.cpp without the former; elsewhere all of this is nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megapt {
namespace emulator __attribute__((visibility("hidden"))) {
namespace races {

struct Range {
    const void *low, *high;
};

#if defined(MEGAPT_EMULATOR_RACES)
// fail: ends the block with a text; called on the stack of the thread that meets the race.
void begin_launch(void (*fail)(const char*));
// x, y, z: the block's index. fixed, dynamic: its shared memory.
void begin_block(unsigned x, unsigned y, unsigned z, Range fixed, Range dynamic);
// From here on the kernel's code of a thread runs. x, y, z: its index.
void enter_thread(int thread, unsigned x, unsigned y, unsigned z, Range stack);
// From here on the emulator's own code runs.
void leave_thread();
void barrier();                               // all threads of the block have met
void warp_barrier(int warp, uint32_t lanes);  // these lanes have met
void fence();                                 // the thread runs a __threadfence
void atomic(const void* address, size_t size);  // the thread reads and writes there at once
#else
inline void begin_launch(void (*)(const char*)) {}
inline void begin_block(unsigned, unsigned, unsigned, Range, Range) {}
inline void enter_thread(int, unsigned, unsigned, unsigned, Range) {}
inline void leave_thread() {}
inline void barrier() {}
inline void warp_barrier(int, uint32_t) {}
inline void fence() {}
inline void atomic(const void*, size_t) {}
#endif

}  // namespace races
}  // namespace emulator
}  // namespace megapt
