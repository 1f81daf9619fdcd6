// One block at a time on one OS thread: fibers for its threads, barriers, warp operations, thread orders, detectors.
//
// A thread runs until it waits (at a barrier or a warp operation) or returns; then the order in force chooses the next
// ready one. No thread is stopped anywhere else, so a run is a function of the kernel, its arguments and the order.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "simt_fiber.h"
#include "simt_memory.h"

namespace megapt {
namespace emulator __attribute__((visibility("hidden"))) {

enum Code : int {  // the values of cudaError_t
    kSuccess = 0,
    kInvalidValue = 1,
    kMemoryAllocation = 2,
    kInvalidConfiguration = 9,
    kIllegalAddress = 700,
    kMisalignedAddress = 716,
    kLaunchFailure = 719,
};

enum Order : int { kForward = 0, kReversed = 1, kShuffled = 2 };

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

struct Site {  // a line of the kernel's source
    const char* file;
    int line;
};

struct Triple {
    unsigned x, y, z;
};

struct Thread {
    const char* waits_at = nullptr;  // the function it waits in; nullptr: it does not wait
    uint32_t mask = 0;               // in a warp operation: the lanes it waits for
    Site site{nullptr, 0};
    int source = 0;       // in a warp operation: the lane it asks
    uint64_t value = 0;   // what it gives
    uint64_t result = 0;  // what it gets
    Fiber* fiber = nullptr;
};

// Writes the results of the lanes `named`, all of which wait in the same warp operation.
using Combine = void (*)(Thread* lanes, uint32_t named);

struct Warp {  // bit l: lane l
    uint32_t live = 0;     // exists and has not returned
    uint32_t ready = 0;    // may run
    uint32_t waiting = 0;  // is in a warp operation
    Combine combine[kWarp];
};

// What kernels read as threadIdx, blockIdx, blockDim and gridDim.
inline Triple thread_index{0, 0, 0}, block_index{0, 0, 0}, block_size{1, 1, 1}, grid_size{1, 1, 1};

inline std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline std::string text(const char* format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

inline std::string text(Triple t) { return text("(%u,%u,%u)", t.x, t.y, t.z); }

class Machine {
   public:
    // Runs one block whose index is in block_index; true if its threads all returned without an error.
    bool run_block(void (*kernel)(void*), void* arguments, Triple size, size_t shared, Order order, uint64_t seed);

    int code() const { return code_; }
    const std::string& error() const { return error_; }
    void clear() { code_ = kSuccess, error_.clear(); }

    void enter() { shared_.enter(); }
    void leave() { shared_.leave(); }
    int lane() const { return current_ % kWarp; }
    uint32_t live_lanes() const { return warps_[current_ / kWarp].live; }
    bool inside() const { return current_ >= 0; }
    char* dynamic_shared() { return shared_.dynamic(); }

    // A barrier of the block. Afterwards true_predicates() and arrived() tell of the threads that came.
    void barrier(const char* what, bool predicate, Site site);
    int true_predicates() const { return passed_true_; }
    int arrived() const { return passed_; }

    // An operation of the lanes of `mask`; returns the caller's result.
    uint64_t warp_operation(const char* what, uint32_t mask, uint64_t value, int source, Combine combine, Site site);

    // The current thread reads and writes there at once.
    void begin_atomic(const void* address, size_t size) {
        races::atomic(address, size);
        races::leave_thread();
    }
    void end_atomic() { enter_kernel(); }

    // Lets other ready threads run: for a thread that waits for a value in memory.
    void let_others_run();

    // Ends the block: no thread of it runs on. Also called from the signal handler.
    [[noreturn]] void fail(int code, const std::string& what);

    // What lies at an address that faulted, in words.
    std::string place(const void* address);

   private:
    static void fiber_main();
    void enter_kernel();
    void prepare(Triple size);
    int choose(uint32_t bits);
    int next();
    void go(Context& from, int thread);
    void wait();
    void finish();
    bool complete(Warp& warp, int lane);
    void release_barrier();
    [[noreturn]] void fail_stuck();
    Fiber* take_fiber();
    std::string describe(int thread);
    std::string index(int thread) { return text(indices_[thread]); }

    Thread threads_[kMaxThreads];
    Warp warps_[kWarp];
    Triple indices_[kMaxThreads];
    Triple shape_{0, 0, 0};
    int count_ = 0;
    uint32_t ready_warps_ = 0;
    int current_ = -1;
    int live_ = 0;
    int waiting_ = 0, true_ = 0, first_ = 0;  // of the barrier that threads wait at
    int passed_ = 0, passed_true_ = 0;        // of the one passed last
    Order order_ = kForward;
    uint64_t random_ = 1;
    void (*kernel_)(void*) = nullptr;
    void* arguments_ = nullptr;
    Context home_;
    std::vector<Fiber*> fibers_, free_;
    SharedMemory shared_;
    int code_ = kSuccess;
    std::string error_;
};

inline Machine& machine() {
    static Machine* one = new Machine;  // never destroyed: a thread may launch while the process leaves
    return *one;
}

inline void Machine::prepare(Triple size) {
    if (size.x != shape_.x || size.y != shape_.y || size.z != shape_.z) {
        int t = 0;
        for (unsigned z = 0; z < size.z; ++z)
            for (unsigned y = 0; y < size.y; ++y)
                for (unsigned x = 0; x < size.x; ++x) indices_[t++] = {x, y, z};
        shape_ = size;
        count_ = t;
    }
    ready_warps_ = 0;
    for (int w = 0; w * kWarp < count_; ++w) {
        const int lanes = count_ - w * kWarp < kWarp ? count_ - w * kWarp : kWarp;
        warps_[w].live = warps_[w].ready = lanes == kWarp ? ~0u : (1u << lanes) - 1;
        warps_[w].waiting = 0;
        ready_warps_ |= 1u << w;
    }
    for (int t = 0; t < count_; ++t) threads_[t].waits_at = nullptr, threads_[t].fiber = nullptr;
    live_ = count_;
    waiting_ = true_ = 0;
}

inline bool Machine::run_block(void (*kernel)(void*), void* arguments, Triple size, size_t shared, Order order,
                               uint64_t seed) {
    kernel_ = kernel, arguments_ = arguments, order_ = order, random_ = seed * 2 + 1;
    if (!shared_.poison(shared)) {
        code_ = kMemoryAllocation, error_ = "no memory for the block's shared memory";
        return false;
    }
    if (free_.empty()) {  // the first block: from now on at least one stack is free between blocks
        Fiber* first = take_fiber();
        if (!first) {
            code_ = kMemoryAllocation, error_ = "no memory for a stack";
            return false;
        }
        free_.push_back(first);
    }
    prepare(size);
    races::begin_block(block_index.x, block_index.y, block_index.z, shared_.fixed_range(), shared_.dynamic_range());
    go(home_, next());
    current_ = -1;
    if (code_ != kSuccess) {  // threads were left where they stood
        for (Fiber* fiber : fibers_) fiber->restart(fiber_main);
        free_ = fibers_;
    }
    return code_ == kSuccess;
}

inline int Machine::choose(uint32_t bits) {
    if (order_ == kForward) return __builtin_ctz(bits);
    if (order_ == kReversed) return 31 - __builtin_clz(bits);
    random_ = random_ * 6364136223846793005u + 1442695040888963407u;
    int skip = static_cast<int>((random_ >> 33) % static_cast<unsigned>(__builtin_popcount(bits)));
    while (skip-- > 0) bits &= bits - 1;
    return __builtin_ctz(bits);
}

// The thread to run, -1 if none is ready.
inline int Machine::next() {
    if (!ready_warps_) return -1;
    const int warp = choose(ready_warps_);
    return warp * kWarp + choose(warps_[warp].ready);
}

inline Fiber* Machine::take_fiber() {
    if (free_.empty()) {
        Fiber* fiber = new (std::nothrow) Fiber;
        if (!fiber || !fiber->make(static_cast<int>(fibers_.size()), fiber_main)) {
            delete fiber;
            return nullptr;
        }
        fibers_.push_back(fiber);
        return fiber;
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
}

// Leaves the stack of `from` for a thread's, or for the launcher's (thread -1).
inline void Machine::go(Context& from, int thread) {
    if (thread < 0) return switch_context(from, home_);
    if (!threads_[thread].fiber && !(threads_[thread].fiber = take_fiber()))
        fail(kMemoryAllocation, "no memory for the stacks of the block's threads");
    current_ = thread;
    thread_index = indices_[thread];
    switch_context(from, threads_[thread].fiber->context);
}

// The current thread's own code runs from here on.
inline void Machine::enter_kernel() {
    const Fiber& fiber = *threads_[current_].fiber;
    races::enter_thread(current_, thread_index.x, thread_index.y, thread_index.z, {fiber.low(), fiber.high()});
}

// A fiber runs one thread after the other; one that never waits takes no second stack.
inline void Machine::fiber_main() {
    Machine& m = machine();
    for (;;) {
        m.enter_kernel();
        m.kernel_(m.arguments_);
        races::leave_thread();
        Fiber* own = m.threads_[m.current_].fiber;
        m.finish();
        const int following = m.next();
        if (following < 0 && m.live_ > 0) m.fail_stuck();
        if (following >= 0 && !m.threads_[following].fiber) {
            m.threads_[following].fiber = own;
            m.current_ = following;
            thread_index = m.indices_[following];
            continue;
        }
        m.free_.push_back(own);
        m.go(own->context, following);  // comes back when the fiber has been taken for another thread
    }
}

// The current thread has returned: those that waited for it alone may go on.
inline void Machine::finish() {
    Warp& warp = warps_[current_ / kWarp];
    const uint32_t bit = 1u << lane();
    warp.live &= ~bit;
    warp.ready &= ~bit;
    if (!warp.ready) ready_warps_ &= ~(1u << (current_ / kWarp));
    --live_;
    for (uint32_t left = warp.waiting; left; left &= left - 1) {
        const int other = __builtin_ctz(left);
        if ((warp.waiting >> other & 1) && complete(warp, other)) ready_warps_ |= 1u << (current_ / kWarp);
    }
    if (waiting_ > 0 && waiting_ == live_) release_barrier();
}

// The current thread is not ready any more, or lets others go first.
inline void Machine::wait() {
    const int me = current_;
    const int following = next();
    if (following < 0) fail_stuck();
    if (following != me) go(threads_[me].fiber->context, following);
    enter_kernel();
}

inline void Machine::barrier(const char* what, bool predicate, Site site) {
    races::leave_thread();
    Thread& me = threads_[current_];
    me.waits_at = what, me.site = site, me.mask = 0;
    if (waiting_ == 0) first_ = current_, true_ = 0;
    const Thread& first = threads_[first_];
    if (first.site.line != site.line || strcmp(first.waits_at, what) || strcmp(first.site.file, site.file))
        fail(kLaunchFailure, "divergent barrier: it is at " + describe(current_) + " while thread " + index(first_) +
                                 " waits at " + describe(first_));
    Warp& warp = warps_[current_ / kWarp];
    warp.ready &= ~(1u << lane());
    if (!warp.ready) ready_warps_ &= ~(1u << (current_ / kWarp));
    ++waiting_, true_ += predicate;
    if (waiting_ == live_) release_barrier();
    wait();
}

inline void Machine::release_barrier() {
    races::barrier();
    passed_ = waiting_, passed_true_ = true_;
    waiting_ = 0;
    for (int w = 0; w * kWarp < count_; ++w) {
        warps_[w].ready = warps_[w].live;
        if (!warps_[w].live) continue;
        ready_warps_ |= 1u << w;
        for (uint32_t left = warps_[w].live; left; left &= left - 1)
            threads_[w * kWarp + __builtin_ctz(left)].waits_at = nullptr;
    }
}

inline uint64_t Machine::warp_operation(const char* what, uint32_t mask, uint64_t value, int source, Combine combine,
                                        Site site) {
    races::leave_thread();
    Thread& me = threads_[current_];
    Warp& warp = warps_[current_ / kWarp];
    const uint32_t bit = 1u << lane();
    me.waits_at = what, me.site = site, me.mask = mask, me.value = value, me.source = source;
    if (!(mask & bit)) fail(kLaunchFailure, "wrong mask: its own lane is not in that of " + describe(current_));
    warp.combine[lane()] = combine;
    warp.waiting |= bit;
    warp.ready &= ~bit;
    complete(warp, lane());
    if (!warp.ready) ready_warps_ &= ~(1u << (current_ / kWarp));
    wait();
    return me.result;
}

// Lets the warp operation of a waiting lane happen if all lanes of its mask that have not returned are in it.
inline bool Machine::complete(Warp& warp, int lane) {
    Thread* lanes = threads_ + (&warp - warps_) * kWarp;
    const Thread& one = lanes[lane];
    const uint32_t named = one.mask & warp.live;
    if (named & ~warp.waiting) return false;
    for (uint32_t left = named; left; left &= left - 1) {
        const Thread& other = lanes[__builtin_ctz(left)];
        if (other.mask != one.mask) return false;
        if (other.waits_at != one.waits_at && strcmp(other.waits_at, one.waits_at)) return false;
    }
    warp.combine[lane](lanes, named);
    if (!strcmp(one.waits_at, "__syncwarp")) races::warp_barrier(static_cast<int>(&warp - warps_), named);
    for (uint32_t left = named; left; left &= left - 1) lanes[__builtin_ctz(left)].waits_at = nullptr;
    warp.waiting &= ~named;
    warp.ready |= named;
    return true;
}

inline void Machine::let_others_run() {
    races::leave_thread();
    const int me = current_;
    int other = (me + 1) % count_;
    while (other != me && !(warps_[other / kWarp].ready >> (other % kWarp) & 1)) other = (other + 1) % count_;
    if (other != me) go(threads_[me].fiber->context, other);
    enter_kernel();
}

inline std::string Machine::describe(int thread) {
    const Thread& t = threads_[thread];
    const std::string mask = t.mask ? text(" with mask 0x%08x", t.mask) : std::string();
    return text("%s%s (%s:%d)", t.waits_at, mask.c_str(), t.site.file, t.site.line);
}

// No thread can run and some have not returned. Names the first thread of each place where threads wait.
inline void Machine::fail_stuck() {
    std::string places, last;
    int shown = 0, thread = -1;
    bool warp_operation = false;
    for (int t = 0; t < count_; ++t) {
        if (!threads_[t].waits_at) continue;
        const std::string place = describe(t);
        warp_operation |= threads_[t].mask != 0;
        if (thread < 0) thread = t;
        if (place == last) continue;
        last = place;
        if (++shown <= 4) places += (shown > 1 ? "; thread " : "thread ") + index(t) + " waits at " + place;
    }
    const int returned = count_ - live_;
    current_ = thread;
    fail(kLaunchFailure,
         std::string(warp_operation ? "deadlock, a warp operation whose mask names lanes that do not come: "
                                    : "deadlock: ") +
             places + (shown > 4 ? "; and elsewhere" : "") +
             text("; %d of %d threads have returned", returned, count_));
}

inline void Machine::fail(int code, const std::string& what) {
    races::leave_thread();
    code_ = code;
    error_ = "block " + text(block_index);
    if (current_ >= 0) error_ += ", thread " + index(current_);
    error_ += ": " + what;
    Context abandoned;
    switch_context(abandoned, home_);
    __builtin_unreachable();
}

inline std::string Machine::place(const void* address) {
    for (Fiber* fiber : fibers_)
        if (fiber->overflowed(address)) return "the end of the thread's stack (its local arrays are too large here)";
    return shared_.beyond(address) ? "beyond the launch's dynamic shared memory" : "global memory that is not there";
}

}  // namespace emulator
}  // namespace megapt
