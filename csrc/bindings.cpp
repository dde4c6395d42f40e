// The Python module rellax._C: the only file that knows of Python. Tensors come in as addresses and sizes.
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "cflora.h"
#include "dispatch.h"
#include "history_topk.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

rellax::Dtype dtype_named(const std::string& name) {
    if (name == "float32") return rellax::Dtype::float32;
    if (name == "bfloat16") return rellax::Dtype::bfloat16;
    if (name == "float16") return rellax::Dtype::float16;
    throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got " + name);
}

rellax::CfloraUpdate cflora_update(const char* dtype, int64_t r, int64_t d_from, int64_t d_to, Address from,
                                   int64_t from_stride, Address down, Address up, Address gate, float scale,
                                   const rellax::Dropout& dropout, Address to, Address h) {
    rellax::CfloraUpdate task{};
    task.dtype = dtype_named(dtype);
    task.r = r;
    task.d_from = d_from;
    task.d_to = d_to;
    task.from = at<const void>(from);
    task.from_stride = from_stride;
    task.down = at<const float>(down);
    task.up = at<const float>(up);
    task.gate = at<const float>(gate);
    task.scale = scale;
    task.dropout = dropout;
    task.to = at<void>(to);
    task.h = at<float>(h);
    return task;
}

void cflora_forward(const char* dtype, int64_t r, int64_t d_from, int64_t d_to, Address from, int64_t from_stride,
                    Address down, Address up, Address gate, float scale, const rellax::Dropout& dropout, Address to,
                    Address h, Address offsets, int64_t instances, int threads) {
    const auto task =
        cflora_update(dtype, r, d_from, d_to, from, from_stride, down, up, gate, scale, dropout, to, h);
    const nb::gil_scoped_release unlocked;
    rellax::cflora_forward(task, at<const int64_t>(offsets), instances, threads);
}

void cflora_backward(const char* dtype, int64_t r, int64_t d_from, int64_t d_to, Address from, int64_t from_stride,
                     Address down, Address up, Address gate, float scale, const rellax::Dropout& dropout, Address to,
                     Address h, Address dh, Address z, Address dgate, Address offsets, int64_t instances,
                     int threads) {
    auto task = cflora_update(dtype, r, d_from, d_to, from, from_stride, down, up, gate, scale, dropout, to, h);
    task.dh = at<float>(dh);
    task.z = at<float>(z);
    const nb::gil_scoped_release unlocked;
    rellax::cflora_backward(task, at<const int64_t>(offsets), instances, at<float>(dgate), threads);
}

void cflora_outer(const char* dtype, int64_t tokens, int64_t r, int64_t d, Address left, Address right,
                  int64_t right_stride, const rellax::Dropout& dropout, Address out, int threads) {
    const rellax::CfloraOuter task{dtype_named(dtype), tokens,       r,       d, at<const float>(left),
                                   at<const void>(right), right_stride, dropout, at<float>(out)};
    const nb::gil_scoped_release unlocked;
    rellax::cflora_outer(task, threads);
}

void history_topk(Address embeddings, const char* dtype, int64_t dim, Address items, Address offsets, Address target,
                  Address user, Address end, int64_t queries, int64_t k, Address positions, Address scores,
                  int threads) {
    const rellax::HistoryTopk task{at<const void>(embeddings),
                                   dtype_named(dtype),
                                   dim,
                                   at<const int64_t>(items),
                                   at<const int64_t>(offsets),
                                   at<const int64_t>(target),
                                   at<const int64_t>(user),
                                   at<const int64_t>(end),
                                   queries,
                                   k,
                                   at<int64_t>(positions),
                                   at<float>(scores)};
    const nb::gil_scoped_release unlocked;
    rellax::history_topk(task, threads);
}

nb::list supported_isas() {
    nb::list names;
    for (const rellax::Level* level : rellax::supported_levels()) names.append(level->name);
    return names;
}

void raise_input_error(const std::exception_ptr& error, void*) {
    try {
        std::rethrow_exception(error);
    } catch (const std::invalid_argument& invalid) {
        PyErr_SetString(nb::module_::import_("rellax.errors").attr("InputError").ptr(), invalid.what());
    }
}

}  // namespace

NB_MODULE(_C, m) {
    nb::register_exception_translator(raise_input_error);
    m.def("isa", [] { return rellax::level().name; }, "The ISA level in use.");
    m.def("supported_isas", supported_isas, "The ISA levels this machine can run, the plainest first.");
    nb::class_<rellax::Dropout>(m, "Dropout").def(
        "__init__",
        [](rellax::Dropout* self, Address column, uint32_t seed, int32_t threshold, float factor) {
            new (self) rellax::Dropout{at<const uint32_t>(column), seed, threshold, factor};
        },
        nb::kw_only(), "column"_a = 0, "seed"_a = 0, "threshold"_a = 0, "factor"_a = 1.0f,
        "Which elements are dropped; by default none. csrc/cflora.h says what the fields hold.");
    m.def("cflora_forward", &cflora_forward, nb::kw_only(), "dtype"_a, "r"_a, "d_from"_a, "d_to"_a, "from_"_a,
          "from_stride"_a, "down"_a, "up"_a, "gate"_a, "scale"_a, "dropout"_a, "to"_a, "h"_a, "offsets"_a,
          "instances"_a, "threads"_a, "y += s · (h G) Bᵀ over the memory at these addresses; see csrc/cflora.h.");
    m.def("cflora_backward", &cflora_backward, nb::kw_only(), "dtype"_a, "r"_a, "d_from"_a, "d_to"_a, "from_"_a,
          "from_stride"_a, "down"_a, "up"_a, "gate"_a, "scale"_a, "dropout"_a, "to"_a, "h"_a, "dh"_a, "z"_a,
          "dgate"_a, "offsets"_a, "instances"_a, "threads"_a,
          "dx += drop(dh A), dG, dh and z over the memory at these addresses; see csrc/cflora.h.");
    m.def("cflora_outer", &cflora_outer, nb::kw_only(), "dtype"_a, "tokens"_a, "r"_a, "d"_a, "left"_a, "right"_a,
          "right_stride"_a, "dropout"_a, "out"_a, "threads"_a,
          "leftᵀ drop(right) over the memory at these addresses; see csrc/cflora.h.");
    m.def("history_topk", &history_topk, nb::kw_only(), "embeddings"_a, "dtype"_a, "dim"_a, "items"_a, "offsets"_a,
          "target"_a, "user"_a, "end"_a, "queries"_a, "k"_a, "positions"_a, "scores"_a, "threads"_a,
          "history_topk over the memory at these addresses; see csrc/history_topk.h for what they hold.");
}
