// The Python module w2w_fast._native: addresses and sizes in, nothing returned. The only file
// that knows Python. Tensors, shapes and devices are checked by the caller, w2w_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "reconstruct.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

w2w::Dtype dtype(const char* name, int code) {
    if (code != 0 && code != 1)
        throw std::invalid_argument(std::string(name) + ": wanted 0 (f32) or 1 (bf16), got " +
                                    std::to_string(code));
    return static_cast<w2w::Dtype>(code);
}

void at_least(const char* name, std::int64_t least, std::int64_t got) {
    if (got < least)
        throw std::invalid_argument(std::string(name) + ": wanted at least " +
                                    std::to_string(least) + ", got " + std::to_string(got));
}

template <class T>
T* address(std::uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

void reconstruct(std::uintptr_t c, std::int64_t k, std::int64_t m, std::int64_t ldc,
                 std::uintptr_t basis, int basis_dtype, std::int64_t d, std::int64_t ldb,
                 std::uintptr_t mean, std::uintptr_t std, std::uintptr_t out, int out_dtype,
                 std::int64_t ldo, int threads) {
    at_least("k", 0, k);
    at_least("m", 0, m);
    at_least("d", 0, d);
    if (k > 1) at_least("ldc", 0, ldc);  // 0: the same row for every identity
    if (d > 1) at_least("ldb", 0, ldb);
    if (k > 1) at_least("ldo", d, ldo);  // the rows of the result may not overlap
    at_least("threads", 1, threads);
    w2w::cpu::reconstruct({address<const float>(c), k, m, ldc, address<const void>(basis),
                           dtype("basis_dtype", basis_dtype), d, ldb, address<const float>(mean),
                           address<const float>(std), address<void>(out),
                           dtype("out_dtype", out_dtype), ldo},
                          threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of w2w_fast. Pointers are addresses, strides are counted in elements.";
    m.attr("__version__") = W2W_VERSION;
    m.def("reconstruct", &reconstruct, "c_ptr"_a, "k"_a, "m"_a, "ldc"_a, "basis_ptr"_a,
          "basis_dtype"_a, "d"_a, "ldb"_a, "mean_ptr"_a, "std_ptr"_a, "out_ptr"_a, "out_dtype"_a,
          "ldo"_a, "threads"_a, py::call_guard<py::gil_scoped_release>(),
          "out[k, d] = mean + std * (c[k, m] @ basis[d, m]^T), summed in f32. "
          "dtype codes: 0 = f32, 1 = bf16; c, mean and std are f32. Releases the GIL.");
    m.def(
        "cpu_features",
        [] {
            return py::dict("isa"_a = w2w::cpu::isa(), "compiled"_a = w2w::cpu::compiled_isas(),
                            "supported"_a = w2w::cpu::supported_isas());
        },
        "The instruction set in use, those compiled in and those this machine runs, best first.");
    m.def("set_isa", &w2w::cpu::set_isa, "name"_a,
          "Use another supported instruction set; ValueError names them. For tests.");
}
