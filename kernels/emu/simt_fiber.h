// Stacks of one OS thread between which execution switches in user space: a fiber runs one CUDA thread of a block.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(MEGAPT_EMULATOR_UCONTEXT)
#define MEGAPT_EMULATOR_UCONTEXT 1  // slower, any processor
#endif

#if defined(MEGAPT_EMULATOR_UCONTEXT)
#include <ucontext.h>
#else
extern "C" __attribute__((visibility("hidden"))) void megapt_emulator_switch(void** save, void* load);
// Saves what the System V ABI lets a callee not change, on the stack it leaves; the emulator never changes mxcsr or the
// x87 control word. The section group lets every translation unit of a library bring it.
asm(R"(
    .pushsection .text.megapt_emulator_switch,"axG",@progbits,megapt_emulator_switch,comdat
    .weak megapt_emulator_switch
    .hidden megapt_emulator_switch
    .type megapt_emulator_switch,@function
megapt_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size megapt_emulator_switch,.-megapt_emulator_switch
    .popsection
)");
#endif

namespace megapt {
namespace emulator __attribute__((visibility("hidden"))) {

#if defined(MEGAPT_EMULATOR_UCONTEXT)
struct Context {
    ucontext_t state;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void start_context(Context& context, char* low, char* top, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = low;
    context.state.uc_stack.ss_size = static_cast<size_t>(top - low);
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}
#else
struct Context {
    void* stack_pointer = nullptr;
};

inline void switch_context(Context& from, Context& to) {
    megapt_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

inline void start_context(Context& context, char*, char* top, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(top);
    *--frame = nullptr;                         // stands for entry's return address: the ABI's alignment
    *--frame = reinterpret_cast<void*>(entry);  // popped by the switch's ret
    for (int saved = 0; saved < 6; ++saved) *--frame = nullptr;
    context.stack_pointer = frame;
}
#endif

// A stack above memory that may not be touched. Made once, used by one CUDA thread after the other.
class Fiber {
   public:
    static constexpr size_t kStack = 512 * 1024;   // the most local memory that a thread has on a GPU
    static constexpr size_t kGuard = 1024 * 1024;  // so large that no kernel's frame reaches over it

    Context context;

    // false: no memory. number: this fiber's, to spread the tops of the stacks over the sets of the caches.
    bool make(int number, void (*entry)()) {
        void* memory = mmap(nullptr, kGuard + kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return false;
        guard_ = static_cast<char*>(memory);
        if (mprotect(guard_ + kGuard, kStack, PROT_READ | PROT_WRITE)) {
            munmap(memory, kGuard + kStack);
            return false;
        }
        top_ = guard_ + kGuard + kStack - static_cast<size_t>(number % 61) * 320;
        restart(entry);
        return true;
    }

    void restart(void (*entry)()) { start_context(context, guard_ + kGuard, top_, entry); }

    bool overflowed(const void* address) const { return address >= guard_ && address < guard_ + kGuard; }

    const char* low() const { return guard_ + kGuard; }
    const char* high() const { return guard_ + kGuard + kStack; }

   private:
    char* guard_ = nullptr;
    char* top_ = nullptr;
};

}  // namespace emulator
}  // namespace megapt
