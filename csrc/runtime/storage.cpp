#include "runtime/storage.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <string>

#include "formats/format.h"
#include "runtime/checksum.h"
#include "runtime/ownership.h"
#include "runtime/team.h"

namespace lc {
namespace {

// What is moved at once: small enough to be summed up from the cache that it was copied through.
constexpr int64_t kBlock = 256 << 10;
constexpr int64_t kPage = 4096;

uint8_t* page_of(uint8_t* at) { return at - reinterpret_cast<uintptr_t>(at) % kPage; }

struct alignas(64) Sum {
  uint64_t value = 0;
};

struct MoveArgs {
  Memory memory;
  FilePlace place;
  Sum* sums;  // one a thread
  std::atomic<int>* error;
};

// Calls fn(begin, end) for every block that thread tid owns.
template <class Fn>
void each_block(const Memory& r, int tid, int nt, const Fn& fn) {
  for (int64_t at = 0; at < r.bytes; at += kBlock) {
    const int64_t end = std::min(r.bytes, at + kBlock);
    if (owner_of_byte(at + (end - at) / 2, r.bytes, r.groups, nt) == tid) fn(at, end);
  }
}

// Reads or writes all of [begin, end), or gives an errno or kEnded.
template <class Move>
int move_all(const MoveArgs& a, int64_t begin, int64_t end, const Move& move) {
  const int64_t last = a.place.direct ? round_up(end, kDirectAlign) : end;
  for (int64_t at = begin; at < last;) {
    const ssize_t n = move(a.place.file, a.memory.data + at, static_cast<size_t>(last - at), a.place.offset + at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (n == 0) return kEnded;
    at += n;
  }
  return 0;
}

void read_kernel(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const MoveArgs*>(p);
  each_block(a.memory, ctx.tid, ctx.nt, [&](int64_t begin, int64_t end) {
    if (a.error->load(std::memory_order_relaxed) != 0) return;
    const int failed = move_all(a, begin, end, pread);
    if (failed != 0) {
      a.error->store(failed, std::memory_order_relaxed);
      return;
    }
    a.sums[ctx.tid].value += block_sum(a.memory.data + begin, end - begin, static_cast<uint64_t>(begin / kBlock));
  });
}

void write_kernel(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const MoveArgs*>(p);
  each_block(a.memory, ctx.tid, ctx.nt, [&](int64_t begin, int64_t end) {
    if (a.error->load(std::memory_order_relaxed) != 0) return;
    a.sums[ctx.tid].value += block_sum(a.memory.data + begin, end - begin, static_cast<uint64_t>(begin / kBlock));
    const int failed = move_all(a, begin, end, pwrite);
    if (failed != 0) {
      a.error->store(failed, std::memory_order_relaxed);
      return;
    }
    // Keeps the disk busy from now on; what it says is fsync's to report.
    if (!a.place.direct) sync_file_range(a.place.file, a.place.offset + begin, end - begin, SYNC_FILE_RANGE_WRITE);
  });
}

void touch_kernel(const Ctx& ctx, const void* p) {
  const auto& r = *static_cast<const Memory*>(p);
  each_block(r, ctx.tid, ctx.nt, [&](int64_t begin, int64_t end) {
    uint8_t* const last = r.data + end;
    for (uint8_t* at = r.data + begin; at < last; at = page_of(at) + kPage) {
      volatile uint8_t* byte = at;
      *byte = *byte;
    }
  });
}

size_t no_scratch(const void*, int) { return 0; }
const Kernel kRead{"read", &read_kernel, &no_scratch};
const Kernel kWrite{"write", &write_kernel, &no_scratch};
const Kernel kTouch{"touch", &touch_kernel, &no_scratch};

Moved move_memory(const Kernel& kernel, const Memory& memory, const FilePlace& place) {
  std::vector<Sum> sums(static_cast<size_t>(Team::get().size()));
  std::atomic<int> error{0};
  const MoveArgs args{memory, place, sums.data(), &error};
  const Node node{&kernel, &args};
  Team::get().run(&node, 1);
  Moved out{0, error.load()};
  for (const Sum& sum : sums) out.sum += sum.value;
  return out;
}

}  // namespace

Moved load_memory(const Memory& to, const FilePlace& from) { return move_memory(kRead, to, from); }
Moved store_memory(const Memory& from, const FilePlace& to) { return move_memory(kWrite, from, to); }

void place_memory(const Memory& memory) {
  const Node node{&kTouch, &memory};
  Team::get().run(&node, 1);
}

Placement placement_of(const Memory& memory) {
  const std::vector<int> nodes = Team::get().nodes();
  const int nt = Team::get().size();
  std::vector<void*> pages;
  std::vector<int> owners;
  for (int64_t at = 0; at < memory.bytes; at += kBlock) {
    const int64_t middle = at + (std::min(memory.bytes, at + kBlock) - at) / 2;
    pages.push_back(page_of(memory.data + middle));
    owners.push_back(owner_of_byte(middle, memory.bytes, memory.groups, nt));
  }
  Placement out;
  std::vector<int> found(pages.size(), -1);
  // With no target nodes this moves nothing and tells where each page lies.
  if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, found.data(), 0) != 0)
    std::fill(found.begin(), found.end(), -1);
  for (size_t i = 0; i < pages.size(); ++i) {
    if (found[i] < 0) {
      ++out.unknown;
      continue;
    }
    ++out.pages;
    if (!nodes.empty() && nodes[static_cast<size_t>(owners[i])] == found[i]) ++out.own;
  }
  return out;
}

}  // namespace lc
