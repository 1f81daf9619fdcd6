// The shared memory of the one block that runs.
//
// __shared__ variables are `static thread_local`: so they lie together, in the library's thread-local memory, and can
// be filled with 0xFF bytes (a NaN of every float type) before each block. What else may lie there is put back after
// the launch. Dynamic shared memory ends at a page that may not be touched.
#pragma once

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simt_races.h"

namespace megapt {
namespace emulator __attribute__((visibility("hidden"))) {

constexpr size_t kMaxShared = 227 * 1024;

// Touching it makes the library's thread-local memory exist on an OS thread.
inline thread_local volatile char shared_anchor;

class SharedMemory {
   public:
    // Before a launch, on the OS thread that runs it.
    void enter() {
        shared_anchor = 0;
        low_ = nullptr, bytes_ = 0;
        dl_iterate_phdr(find, this);
        kept_.assign(low_, low_ + bytes_);
    }

    void leave() {
        if (bytes_) memcpy(low_, kept_.data(), bytes_);
    }

    // Before every block. false: no memory.
    bool poison(size_t dynamic_bytes) {
        if (bytes_) memset(low_, 0xFF, bytes_);
        if (!dynamic_bytes) {
            dynamic_ = end_;
            return true;
        }
        if (!end_ && !make()) return false;
        dynamic_ = end_ - (dynamic_bytes + 15) / 16 * 16;
        memset(dynamic_, 0xFF, static_cast<size_t>(end_ - dynamic_));
        return true;
    }

    char* dynamic() const { return dynamic_; }
    races::Range fixed_range() const { return {low_, low_ + bytes_}; }
    races::Range dynamic_range() const { return {dynamic_, end_}; }

    bool beyond(const void* address) const {
        return end_ && address >= end_ && address < end_ + kMaxShared;
    }

   private:
    bool make() {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t bytes = (kMaxShared + page - 1) / page * page;
        void* memory = mmap(nullptr, 2 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, bytes, PROT_READ | PROT_WRITE)) return false;
        end_ = static_cast<char*>(memory) + bytes;
        return true;
    }

    // The zero-initialised thread-local memory of the library (or program) that holds this code.
    static int find(dl_phdr_info* info, size_t, void* self) {
        SharedMemory& memory = *static_cast<SharedMemory*>(self);
        const uintptr_t here = reinterpret_cast<uintptr_t>(&find);
        const ElfW(Phdr)* thread_local_part = nullptr;
        bool ours = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const ElfW(Phdr)& part = info->dlpi_phdr[i];
            const uintptr_t start = info->dlpi_addr + part.p_vaddr;
            if (part.p_type == PT_LOAD && here >= start && here < start + part.p_memsz) ours = true;
            if (part.p_type == PT_TLS) thread_local_part = &part;
        }
        if (!ours) return 0;
        if (thread_local_part && info->dlpi_tls_data) {
            memory.low_ = static_cast<char*>(info->dlpi_tls_data) + thread_local_part->p_filesz;
            memory.bytes_ = thread_local_part->p_memsz - thread_local_part->p_filesz;
        }
        return 1;
    }

    char* low_ = nullptr;  // the static part
    size_t bytes_ = 0;
    std::vector<char> kept_;
    char* end_ = nullptr;  // of the dynamic part
    char* dynamic_ = nullptr;
};

}  // namespace emulator
}  // namespace megapt
