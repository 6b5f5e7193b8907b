// Running kernels at once or recording them for replay.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

#include "runtime/team.h"

namespace lc {

// A recorded list of kernels with copies of their arguments. The buffers that the arguments name
// must outlive it. Replays as one parallel region.
class Graph {
 public:
  void add(const Kernel& kernel, const void* args, size_t bytes) {
    auto copy = std::make_unique<std::byte[]>(bytes);
    std::memcpy(copy.get(), args, bytes);
    nodes_.push_back({&kernel, copy.get()});
    storage_.push_back(std::move(copy));
  }
  void replay() const { Team::get().run(nodes_.data(), nodes_.size()); }
  size_t size() const { return nodes_.size(); }

  // The graph that this thread records into, if any.
  static Graph*& recording() {
    static thread_local Graph* graph = nullptr;
    return graph;
  }

 private:
  std::vector<Node> nodes_;
  std::vector<std::unique_ptr<std::byte[]>> storage_;
};

// Runs the kernel on the team, or records it where a capture is under way.
template <class Args>
void launch(const Kernel& kernel, const Args& args) {
  if (Graph* graph = Graph::recording()) {
    graph->add(kernel, &args, sizeof args);
    return;
  }
  const Node node{&kernel, &args};
  Team::get().run(&node, 1);
}

}  // namespace lc
