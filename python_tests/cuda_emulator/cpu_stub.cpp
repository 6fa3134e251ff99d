// The CPU half of the bindings, absent: the tests of the CUDA kernels build faster without it.
#include <stdexcept>

#include "adapted_linear.h"
#include "cpu/isa.h"
#include "edit.h"
#include "merge.h"
#include "project.h"
#include "reconstruct.h"

namespace w2w::cpu {
namespace {
[[noreturn]] void absent() { throw std::runtime_error("the CPU half is not in this build"); }
}  // namespace
void reconstruct(const ReconstructParams&, int) { absent(); }
void project(const ProjectParams&, int) { absent(); }
void low_rank(const LowRankParams&, int) { absent(); }
void outer(const OuterParams&, int) { absent(); }
void merge(const MergeParams&, int) { absent(); }
void edit(const EditParams&, int) { absent(); }
std::vector<std::string> compiled_isas() { return {}; }
std::vector<std::string> supported_isas() { return {}; }
std::string isa() { return "absent"; }
void set_isa(const std::string&) { absent(); }
}  // namespace w2w::cpu
