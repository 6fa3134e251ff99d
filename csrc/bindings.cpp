// The Python module w2w_fast._native: cpu.<op> and, where built, cuda.<op>. Arguments are the
// fields of the op's params struct in their order, then what the device needs: threads, or
// scratch and stream. Addresses and sizes in, nothing returned. The only file that knows Python;
// tensors, shapes and devices are checked by the caller, w2w_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "adapted_linear.h"
#include "cpu/isa.h"
#include "edit.h"
#include "merge.h"
#include "project.h"
#include "reconstruct.h"

namespace py = pybind11;
using namespace w2w;

namespace {

using Address = std::uintptr_t;
using i64 = std::int64_t;

template <class T>
T* at(Address value) {
    return reinterpret_cast<T*>(value);
}

[[noreturn]] void refuse(const char* name, const std::string& wanted, i64 got) {
    throw std::invalid_argument(std::string(name) + ": wanted " + wanted + ", got " +
                                std::to_string(got));
}

void at_least(const char* name, i64 least, i64 got) {
    if (got < least) refuse(name, "at least " + std::to_string(least), got);
}

Dtype real(const char* name, int code) {
    if (code < 0 || code > 2) refuse(name, "0 (f32), 1 (bf16) or 2 (f16)", code);
    return static_cast<Dtype>(code);
}

Basis basis(Address rows, int dtype, i64 d, i64 m, i64 stride, Address mean, Address std,
            Address row_scale) {
    if (dtype != 0 && dtype != 1 && dtype != 3 && dtype != 4)
        refuse("basis dtype", "0 (f32), 1 (bf16), 3 (i8) or 4 (u4)", dtype);
    at_least("d", 0, d);
    at_least("m", 0, m);
    if (d > 1) at_least("basis stride", 0, stride);
    return {at<const void>(rows), static_cast<Dtype>(dtype), d, m, stride, at<const float>(mean),
            at<const float>(std), at<const float>(row_scale)};
}

ReconstructParams reconstruct(Address rows, int dtype, i64 d, i64 m, i64 stride, Address mean,
                              Address std, Address row_scale, Address c, i64 k, i64 c_stride,
                              Address out, int out_dtype, i64 out_stride) {
    at_least("k", 0, k);
    if (k > 1) at_least("c stride", 0, c_stride);      // 0: the same row for every identity
    if (k > 1) at_least("out stride", d, out_stride);  // the rows of the result may not overlap
    return {basis(rows, dtype, d, m, stride, mean, std, row_scale), at<const float>(c), k, c_stride,
            at<void>(out), real("out dtype", out_dtype), out_stride};
}

ProjectParams project(Address rows, int dtype, i64 d, i64 m, i64 stride, Address mean, Address std,
                      Address row_scale, Address source, int source_dtype, i64 k, i64 source_stride,
                      bool divide, Address out) {
    at_least("k", 0, k);
    if (k > 1) at_least("source stride", 0, source_stride);
    return {basis(rows, dtype, d, m, stride, mean, std, row_scale), at<const void>(source),
            real("source dtype", source_dtype), k, source_stride, divide, at<float>(out)};
}

void check_rank(i64 rank) {
    if (rank < 1 || rank > 16) refuse("rank", "1 to 16", rank);
}

LowRankParams low_rank(i64 samples, i64 tokens, i64 in, i64 out, i64 rank, i64 adapters,
                       Address base, Address x, Address y, int dtype, i64 base_b, i64 base_t,
                       i64 x_b, i64 x_t, i64 y_b, i64 y_t, Address down, Address up,
                       int adapter_dtype, i64 down_a, i64 down_r, i64 down_i, i64 up_a, i64 up_n,
                       i64 up_r, Address index, Address scales, float scale, Address s) {
    check_rank(rank);
    return {samples, tokens, in, out, rank, adapters, at<const void>(base), at<const void>(x),
            at<void>(y), real("dtype", dtype), base_b, base_t, x_b, x_t, y_b, y_t,
            at<const void>(down), at<const void>(up), real("adapter dtype", adapter_dtype), down_a,
            down_r, down_i, up_a, up_n, up_r, at<const i64>(index), at<const float>(scales), scale,
            at<float>(s)};
}

OuterParams outer(i64 samples, i64 tokens, i64 width, i64 rank, i64 adapters, Address coefficient,
                  Address feature, int dtype, i64 feature_b, i64 feature_t, Address index,
                  Address scales, float scale, Address out, int out_dtype, i64 out_a, i64 out_r,
                  i64 out_n) {
    check_rank(rank);
    return {samples, tokens, width, rank, adapters, at<const float>(coefficient),
            at<const void>(feature), real("dtype", dtype), feature_b, feature_t,
            at<const i64>(index), at<const float>(scales), scale, at<void>(out),
            real("out dtype", out_dtype), out_a, out_r, out_n};
}

MergeParams merge(Address out, Address weight, Address a, Address b, int dtype, int adapter_dtype,
                  Address table, i64 modules, i64 tiles, i64 rank, float scale) {
    at_least("modules", 0, modules);
    return {at<void>(out), at<const void>(weight), at<const void>(a), at<const void>(b),
            real("dtype", dtype), real("adapter dtype", adapter_dtype), at<const MergeModule>(table),
            modules, tiles, rank, scale};
}

EditParams edit(i64 k, i64 d, Address w, int dtype, i64 w_stride, Address delta, int delta_dtype,
                Address amounts, float amount, Address out, i64 out_stride) {
    if (k > 1) at_least("out stride", d, out_stride);
    return {k, d, at<const void>(w), real("dtype", dtype), w_stride, at<const void>(delta),
            real("delta dtype", delta_dtype), at<const float>(amounts), amount, at<void>(out),
            out_stride};
}

// The fields of a struct, then threads, as one Python function.
template <class P, class... Fields>
void on_cpu(py::module_& m, const char* name, P (*params)(Fields...), void (*run)(const P&, int)) {
    const auto call = [=](Fields... fields, int threads) {
        at_least("threads", 1, threads);
        run(params(fields...), threads);
    };
    m.def(name, call, py::call_guard<py::gil_scoped_release>());
}

#ifdef W2W_CUDA
template <class P, class... Fields>
void on_cuda(py::module_& m, const char* name, P (*params)(Fields...),
             void (*run)(const P&, void*)) {
    const auto call = [=](Fields... fields, Address stream) {
        run(params(fields...), at<void>(stream));
    };
    m.def(name, call, py::call_guard<py::gil_scoped_release>());
}

// The same for an op whose caller allocates scratch: <name>_scratch says how many bytes.
template <class P, class... Fields>
void on_cuda(py::module_& m, const char* name, P (*params)(Fields...),
             std::size_t (*scratch)(const P&), void (*run)(const P&, void*, void*)) {
    const auto call = [=](Fields... fields, Address memory, Address stream) {
        run(params(fields...), at<void>(memory), at<void>(stream));
    };
    const auto bytes = [=](Fields... fields) { return scratch(params(fields...)); };
    m.def(name, call, py::call_guard<py::gil_scoped_release>());
    m.def((std::string(name) + "_scratch").c_str(), bytes);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Kernels of w2w_fast. Pointers are addresses, strides are counted in elements.";
    m.attr("__version__") = W2W_VERSION;

    auto c = m.def_submodule("cpu", "Takes the fields of <op>.h's struct, then threads.");
    on_cpu(c, "reconstruct", reconstruct, cpu::reconstruct);
    on_cpu(c, "project", project, cpu::project);
    on_cpu(c, "low_rank", low_rank, cpu::low_rank);
    on_cpu(c, "outer", outer, cpu::outer);
    on_cpu(c, "merge", merge, cpu::merge);
    on_cpu(c, "edit", edit, cpu::edit);

#ifdef W2W_CUDA
    auto g = m.def_submodule("cuda", "Takes the fields of <op>.h's struct, [scratch,] stream.");
    on_cuda(g, "reconstruct", reconstruct, cuda::reconstruct);
    on_cuda(g, "project", project, cuda::project_scratch, cuda::project);
    on_cuda(g, "low_rank", low_rank, cuda::low_rank);
    on_cuda(g, "outer", outer, cuda::outer_scratch, cuda::outer);
    on_cuda(g, "merge", merge, cuda::merge);
    on_cuda(g, "edit", edit, cuda::edit);
    g.attr("architectures") = W2W_CUDA;
#endif

    m.def(
        "cpu_features",
        [] {
            using namespace py::literals;
            return py::dict("isa"_a = cpu::isa(), "compiled"_a = cpu::compiled_isas(),
                            "supported"_a = cpu::supported_isas());
        },
        "The instruction set in use, those compiled in and those this machine runs, best first.");
    m.def("set_isa", &cpu::set_isa, py::arg("name"),
          "Use another supported instruction set; ValueError names them. For tests.");
}
