// The Python module rellax._C: the only file that knows of Python. Tensors come in as addresses and sizes.
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

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
    m.def("history_topk", &history_topk, nb::kw_only(), "embeddings"_a, "dtype"_a, "dim"_a, "items"_a, "offsets"_a,
          "target"_a, "user"_a, "end"_a, "queries"_a, "k"_a, "positions"_a, "scores"_a, "threads"_a,
          "history_topk over the memory at these addresses; see csrc/history_topk.h for what they hold.");
}
