// Instruction sets, best first: what was built, what this machine can run, what is in use.
#pragma once

#include <string>
#include <vector>

namespace w2w::cpu {

std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();
std::string isa();
void set_isa(const std::string& name);  // throws std::invalid_argument; for tests

}  // namespace w2w::cpu
