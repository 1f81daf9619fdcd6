// megapt::launch under the emulator: the checks a GPU makes, the blocks in turn, and what went wrong in words.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <cstdlib>
#include <tuple>

#include "simt_machine.h"

namespace megapt {
namespace emulator __attribute__((visibility("hidden"))) {

struct State {
    std::mutex running;  // one launch at a time, whatever thread asks
    Order order = kForward;
    uint64_t seed = 0;
    uint64_t launches = 0;
    std::string error;
    std::string launcher;  // what a launcher has done wrong before it launched
    pthread_t owner;
    struct sigaction before[2];
};

inline State& state() {
    static State* one = new State;
    return *one;
}

inline std::string kernel_name(const void* kernel) {
    Dl_info info;
    if (!dladdr(kernel, &info) || !info.dli_sname || info.dli_saddr != kernel) return text("kernel at %p", kernel);
    int status = 0;
    char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
    std::string name = status == 0 ? readable : info.dli_sname;
    free(readable);
    return name;
}

// Faults of a kernel's threads become an error of the launch; others go where they went before.
inline void on_fault(int signal, siginfo_t* info, void*) {
    State& s = state();
    if (pthread_equal(pthread_self(), s.owner) && machine().inside())
        machine().fail(kIllegalAddress, text("illegal access of address %p: ", info->si_addr) +
                                            machine().place(info->si_addr));
    sigaction(signal, &s.before[signal == SIGBUS], nullptr);  // returns to the fault
}

class FaultGuard {
   public:
    FaultGuard() {
        static char* stack = new char[kBytes];
        stack_t own{};
        own.ss_sp = stack, own.ss_size = kBytes;
        sigaltstack(&own, &before_);
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        state().owner = pthread_self();
        sigaction(SIGSEGV, &action, &state().before[0]);
        sigaction(SIGBUS, &action, &state().before[1]);
    }
    ~FaultGuard() {
        sigaction(SIGSEGV, &state().before[0], nullptr);
        sigaction(SIGBUS, &state().before[1], nullptr);
        sigaltstack(&before_, nullptr);
    }
    FaultGuard(const FaultGuard&) = delete;
    FaultGuard& operator=(const FaultGuard&) = delete;

   private:
    static constexpr size_t kBytes = 64 * 1024;
    stack_t before_;
};

// A one-to-one map of [0, count): the i-th block to run.
class BlockOrder {
   public:
    BlockOrder(uint64_t count, Order order, uint64_t seed) : count_(count) {
        if (order == kReversed) step_ = count - 1, start_ = count - 1;
        if (order != kShuffled) return;
        step_ = count > 2 ? (seed * 2654435761u + 40503u) % count : 1;
        while (greatest_common_divisor(step_, count) != 1) ++step_;
        start_ = (seed * 0x9E3779B97F4A7C15u >> 16) % count;
    }
    uint64_t operator[](uint64_t i) const {
        return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step_ + start_) % count_);
    }

   private:
    static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
        while (b) {
            const uint64_t rest = a % b;
            a = b, b = rest;
        }
        return a;
    }
    uint64_t count_, step_ = 1, start_ = 0;
};

// What cudaLaunchKernel refuses on every GPU from sm_80 on; empty if nothing.
inline std::string refusal(Triple grid, Triple block, size_t shared, int& code) {
    code = kInvalidConfiguration;
    const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z) return "a grid of no blocks";
    if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return "a grid beyond (2147483647,65535,65535)";
    if (!block.x || !block.y || !block.z) return "a block of no threads";
    if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads > kMaxThreads)
        return "a block beyond (1024,1024,64), or of more than 1024 threads";
    code = kInvalidValue;
    if (shared > kMaxShared) return text("%zu bytes of dynamic shared memory, more than %zu", shared, kMaxShared);
    code = kSuccess;
    return "";
}

inline int run(void (*kernel)(void*), void* arguments, const void* address, Triple grid, Triple block, size_t shared) {
    State& s = state();
    std::lock_guard<std::mutex> lock(s.running);
    Machine& m = machine();
    m.clear();
    s.error.clear();
    const std::string where = text("launch %llu: ", static_cast<unsigned long long>(s.launches++));
    const auto report = [&](const std::string& what) {
        s.error = where + kernel_name(address) + ", grid " + text(grid) + ", block " + text(block) +
                  text(", %zu bytes of dynamic shared memory: ", shared) + what;
    };
    int code = kSuccess;
    std::string refused = refusal(grid, block, shared, code);
    if (!s.launcher.empty()) {
        code = kLaunchFailure, refused = "its launcher: " + s.launcher;
        s.launcher.clear();
    }
    if (code != kSuccess) {
        report(refused);
        return code;
    }
    grid_size = grid, block_size = block;
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    const BlockOrder order(blocks, s.order, s.seed);
    FaultGuard guard;
    m.enter();
    races::begin_launch([](const char* what) { machine().fail(kLaunchFailure, what); });
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t b = order[i];
        block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                       static_cast<unsigned>(b / grid.x / grid.y)};
        if (!m.run_block(kernel, arguments, block, shared, s.order, s.seed ^ b)) break;
    }
    m.leave();
    if (m.code() != kSuccess) report(m.error());
    return m.code();
}

template <class Function, class Tuple>
struct Call {
    Function function;
    Tuple arguments;
    static void enter(void* self) {
        const Call& call = *static_cast<const Call*>(self);
        std::apply(call.function, call.arguments);  // by value: every thread has its own copies
    }
};

}  // namespace emulator

// As in common.cuh; runs the grid before it returns. The stream is not used.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, void*, A... arguments) {
    using Call = emulator::Call<void (*)(P...), std::tuple<P...>>;
    Call call{kernel, std::tuple<P...>(static_cast<P>(arguments)...)};
    return emulator::run(&Call::enter, &call, reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z},
                         {block.x, block.y, block.z}, shared);
}

}  // namespace megapt

extern "C" {

// In which order blocks, warps and the lanes of a warp run: 0 forward, 1 reversed, 2 shuffled by `seed`.
__attribute__((used, visibility("default"))) inline void megapt_emulator_order(int kind, uint64_t seed) {
    megapt::emulator::State& s = megapt::emulator::state();
    std::lock_guard<std::mutex> lock(s.running);
    s.order = static_cast<megapt::emulator::Order>(kind == 1 || kind == 2 ? kind : 0);
    s.seed = seed;
}

// What the latest launch did wrong; empty if nothing. Valid until the next launch.
__attribute__((used, visibility("default"))) inline const char* megapt_emulator_error() {
    return megapt::emulator::state().error.c_str();
}
}
