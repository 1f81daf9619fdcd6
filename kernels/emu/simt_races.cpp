// A detector of data races for emulated kernels: what g++ -fsanitize=thread calls at each access of memory.
//
// Eight bytes of memory have eight records of who accessed which of them. Two accesses of a byte by different threads,
// one of them a write and not both atomic, are a race unless something orders them: in a block __syncthreads, in a warp
// __syncwarp with both lanes (a shuffle or a vote orders no memory), between blocks a __threadfence and an atomic in
// the one and an atomic in the other. Ninth accesses displace older ones: races may be missed, none is invented where
// threads synchronise by these means.
#include "simt_races.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace megapt {
namespace emulator __attribute__((visibility("hidden"))) {
namespace races {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 1024;
constexpr int kSlots = 8;
constexpr uintptr_t kPage = 4096;

enum Kind : uint8_t { kRead = 0, kWrite = 1, kAtomic = 2 };

struct Access {
    uint32_t block;
    uint16_t thread;
    uint8_t bytes;  // of the eight, 0: an empty record
    Kind kind;
    uint32_t epoch;   // barriers of the block before it
    uint32_t clock;   // of its lane
    uint32_t fences;  // of the launch before it
    uint32_t code;    // where in the library
};

struct Cell {
    Access slots[kSlots];
};

bool holds(const Range& range, uintptr_t address) {
    return address >= reinterpret_cast<uintptr_t>(range.low) && address < reinterpret_cast<uintptr_t>(range.high);
}

struct Index {
    unsigned x, y, z;
};

struct Detector {
    void (*fail)(const char*) = nullptr;
    std::unordered_map<uintptr_t, Cell*> pages;  // by address / kPage
    uintptr_t last_page = 0;
    Cell* last_cells = nullptr;
    std::vector<uint32_t> released;  // by block: fences before which its accesses are ordered before who acquires
    std::vector<Index> blocks;
    const char* base = nullptr;  // of the library
    bool on = false, acquired = false;
    uint32_t block = 0, epoch = 0, fences = 0, turn = 0;
    int thread = 0;
    Range stack{nullptr, nullptr};
    Range shared[2] = {};
    uint32_t fenced[kThreads];        // the thread's latest fence
    uint32_t clocks[kThreads][kWarp];  // what a thread knows of the lanes of its warp, and its own
    Index indices[kThreads];
};

Detector& detector() {
    static Detector* one = new Detector;
    return *one;
}

bool ordered(const Detector& d, const Access& before) {
    if (before.block != d.block) return d.acquired && before.fences < d.released[before.block];
    if (before.thread == d.thread || before.epoch < d.epoch) return true;
    return before.thread / kWarp == d.thread / kWarp && before.clock <= d.clocks[d.thread][before.thread % kWarp];
}

const char* name(Kind kind) { return kind == kRead ? "reads" : kind == kWrite ? "writes" : "does an atomic on"; }

[[gnu::noinline]] void report(Detector& d, const Access& before, Kind kind, uintptr_t address, size_t size,
                              uint32_t code) {
    d.on = false;
    const Index t = d.indices[before.thread], b = d.blocks[before.block];
    char text[512], who[96] = "";
    if (before.block == d.block)
        snprintf(who, sizeof who, "thread (%u,%u,%u) of the block", t.x, t.y, t.z);
    else
        snprintf(who, sizeof who, "a thread of block (%u,%u,%u)", b.x, b.y, b.z);
    snprintf(text, sizeof text,
             "race: it %s %zu bytes at 0x%zx (code +0x%x) which %s also accesses (it %s them, code +0x%x), and nothing "
             "orders the two",
             name(kind), size, static_cast<size_t>(address), code, who, name(before.kind), before.code);
    d.fail(text);
}

Cell* cells(Detector& d, uintptr_t page) {
    if (page == d.last_page) return d.last_cells;
    Cell*& found = d.pages[page];
    if (!found) {
        void* memory = mmap(nullptr, kPage / 8 * sizeof(Cell), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        found = static_cast<Cell*>(memory);
    }
    d.last_page = page, d.last_cells = found;
    return found;
}

// One access within eight bytes.
void look(Detector& d, uintptr_t address, size_t size, Kind kind, uint32_t code) {
    Cell* page = cells(d, address / kPage);
    if (!page) return;
    Access* slots = page[address % kPage / 8].slots;
    const uint8_t bytes = static_cast<uint8_t>(((1u << size) - 1) << (address % 8));
    const bool shared = holds(d.shared[0], address) || holds(d.shared[1], address);
    Access* place = nullptr;
    for (int i = 0; i < kSlots; ++i) {
        Access& before = slots[i];
        if (before.block != d.block && shared) before.bytes = 0;  // of the block that had this memory before
        if (!before.bytes) {
            if (!place) place = &before;
            continue;
        }
        const bool mine = before.block == d.block && before.thread == d.thread;
        if (mine && (before.bytes & ~bytes) == 0 && kind >= before.kind) place = &before;
        if (mine || !(before.bytes & bytes)) continue;
        if ((before.kind == kRead && kind == kRead) || (before.kind == kAtomic && kind == kAtomic)) continue;
        if (!ordered(d, before)) return report(d, before, kind, address, size, code);
    }
    if (!place) place = &slots[d.turn++ % kSlots];
    *place = {d.block, static_cast<uint16_t>(d.thread), bytes, kind, d.epoch,
              d.clocks[d.thread][d.thread % kWarp], d.fences, code};
}

void access(const void* where, size_t size, Kind kind, const void* caller) {
    Detector& d = detector();
    if (!d.on || holds(d.stack, reinterpret_cast<uintptr_t>(where))) return;
    const uint32_t code = static_cast<uint32_t>(static_cast<const char*>(caller) - d.base) - 1;
    for (uintptr_t address = reinterpret_cast<uintptr_t>(where), end = address + size; address < end;) {
        const uintptr_t next = address / 8 * 8 + 8 < end ? address / 8 * 8 + 8 : end;
        look(d, address, next - address, kind, code);
        address = next;
    }
}

void forget(Detector& d) {
    for (auto& page : d.pages) munmap(page.second, kPage / 8 * sizeof(Cell));
    d.pages.clear();
    d.last_page = 0;
}

}  // namespace

void begin_launch(void (*fail)(const char*)) {
    Detector& d = detector();
    forget(d);
    d.fail = fail, d.fences = 0;
    d.released.clear(), d.blocks.clear();
    Dl_info info;
    const bool found = dladdr(reinterpret_cast<const void*>(&begin_launch), &info);
    d.base = found ? static_cast<const char*>(info.dli_fbase) : nullptr;
}

void begin_block(unsigned x, unsigned y, unsigned z, Range fixed, Range dynamic) {
    Detector& d = detector();
    d.block = static_cast<uint32_t>(d.blocks.size());
    d.blocks.push_back({x, y, z});
    d.released.push_back(0);
    d.shared[0] = fixed, d.shared[1] = dynamic;
    d.epoch = 0, d.acquired = false;
    memset(d.fenced, 0, sizeof d.fenced);
    memset(d.clocks, 0, sizeof d.clocks);
    for (int t = 0; t < kThreads; ++t) d.clocks[t][t % kWarp] = 1;
}

void enter_thread(int thread, unsigned x, unsigned y, unsigned z, Range stack) {
    Detector& d = detector();
    d.thread = thread, d.indices[thread] = {x, y, z};
    d.stack = stack;
    d.on = true;
}

void leave_thread() { detector().on = false; }

void barrier() { ++detector().epoch; }

void warp_barrier(int warp, uint32_t lanes) {
    Detector& d = detector();
    uint32_t known[kWarp] = {};
    for (int l = 0; l < kWarp; ++l)
        for (int o = 0; o < kWarp && (lanes >> l & 1); ++o)
            if (d.clocks[warp * kWarp + l][o] > known[o]) known[o] = d.clocks[warp * kWarp + l][o];
    for (int l = 0; l < kWarp; ++l) {
        if (!(lanes >> l & 1)) continue;
        uint32_t* own = d.clocks[warp * kWarp + l];
        memcpy(own, known, sizeof known);
        ++own[l];
    }
}

void fence() {
    Detector& d = detector();
    d.fenced[d.thread] = ++d.fences;
}

void atomic(const void* address, size_t size) {
    Detector& d = detector();
    const bool on = d.on;
    d.on = true;
    access(address, size, kAtomic, __builtin_return_address(0));
    d.on = on;
    d.acquired = true;
    if (d.fenced[d.thread] > d.released[d.block]) d.released[d.block] = d.fenced[d.thread];
}

}  // namespace races
}  // namespace emulator
}  // namespace megapt

// What g++ calls. volatile accesses are taken as atomic: a kernel that polls memory says so by them.
using namespace megapt::emulator::races;

#define MEGAPT_HOOK __attribute__((visibility("hidden"))) void
#define MEGAPT_ACCESS(bytes)                                                                            \
    MEGAPT_HOOK __tsan_read##bytes(void* p) { access(p, bytes, kRead, __builtin_return_address(0)); }    \
    MEGAPT_HOOK __tsan_write##bytes(void* p) { access(p, bytes, kWrite, __builtin_return_address(0)); }  \
    MEGAPT_HOOK __tsan_volatile_read##bytes(void* p) { access(p, bytes, kAtomic, __builtin_return_address(0)); } \
    MEGAPT_HOOK __tsan_volatile_write##bytes(void* p) { access(p, bytes, kAtomic, __builtin_return_address(0)); }
#define MEGAPT_UNALIGNED(bytes)                                                                                  \
    MEGAPT_HOOK __tsan_unaligned_read##bytes(void* p) { access(p, bytes, kRead, __builtin_return_address(0)); }   \
    MEGAPT_HOOK __tsan_unaligned_write##bytes(void* p) { access(p, bytes, kWrite, __builtin_return_address(0)); }

extern "C" {
MEGAPT_ACCESS(1)
MEGAPT_ACCESS(2)
MEGAPT_ACCESS(4)
MEGAPT_ACCESS(8)
MEGAPT_ACCESS(16)
MEGAPT_UNALIGNED(2)
MEGAPT_UNALIGNED(4)
MEGAPT_UNALIGNED(8)
MEGAPT_UNALIGNED(16)
MEGAPT_HOOK __tsan_read_range(void* p, size_t bytes) { access(p, bytes, kRead, __builtin_return_address(0)); }
MEGAPT_HOOK __tsan_write_range(void* p, size_t bytes) { access(p, bytes, kWrite, __builtin_return_address(0)); }
MEGAPT_HOOK __tsan_vptr_update(void**, void*) {}
MEGAPT_HOOK __tsan_vptr_read(void**) {}
MEGAPT_HOOK __tsan_func_entry(void*) {}
MEGAPT_HOOK __tsan_func_exit() {}
MEGAPT_HOOK __tsan_init() {}
// Of the guards of function-local statics.
__attribute__((visibility("hidden"))) char __tsan_atomic8_load(const volatile char* p, int) {
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
}
