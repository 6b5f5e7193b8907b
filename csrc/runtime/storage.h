// Weights between files and memory: every byte is moved by the thread that owns it, so that it comes to
// lie in that thread's memory node, and summed up on the way.
#pragma once

#include <cstdint>
#include <vector>

namespace lc {

// Memory that the team's threads own: `groups` equal pieces (experts), each shared out over all
// threads, or one.
struct Memory {
  uint8_t* data;
  int64_t bytes, groups;
};

// A place in an open file. `direct`: opened with O_DIRECT, whose addresses, offsets and lengths are
// multiples of kDirectAlign; what lies behind `bytes` up to the next multiple is moved too.
struct FilePlace {
  int file;
  int64_t offset;
  bool direct;
};
constexpr int64_t kDirectAlign = 4096;

// A checksum of the bytes, the same for any number of threads and groups, and 0, an errno, or kEnded.
struct Moved {
  uint64_t sum;
  int error;
};
constexpr int kEnded = -1;  // the file ends too soon
Moved load_memory(const Memory& to, const FilePlace& from);
Moved store_memory(const Memory& from, const FilePlace& to);

// Writes to one byte of every page, without changing it: fresh memory comes to lie with its owners.
void place_memory(const Memory& memory);

// Where the pages lie; one page of every 256 KiB is looked at.
struct Placement {
  int64_t pages = 0;    // looked at and there
  int64_t unknown = 0;  // not there, or the system would not tell
  int64_t own = 0;      // in the node of the thread that owns them
};
Placement placement_of(const Memory& memory);

}  // namespace lc
