// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set: the best that is compiled in and that this processor runs. FUSAE_CPU_ISA is read in Python.
#include <cstring>

#include "fusae/ops.h"

namespace fusae::cpu {

namespace generic { extern const Table table; }
#if defined(__x86_64__)
namespace avx2 { extern const Table table; }
namespace avx512 { extern const Table table; }
#endif

namespace {

const Table* const TABLES[] = {
#if defined(__x86_64__)
    &avx512::table, &avx2::table,
#endif
    &generic::table,
};
constexpr int COUNT = sizeof(TABLES) / sizeof(TABLES[0]);

bool runs(const Table& t) {
#if defined(__x86_64__)
  if (&t == &avx512::table) return __builtin_cpu_supports("x86-64-v4");
  if (&t == &avx2::table) return __builtin_cpu_supports("x86-64-v3");
#endif
  return &t == &generic::table;
}

const Table* find(const char* name) {
  for (const Table* t : TABLES) {
    if (!std::strcmp(t->name, name)) return t;
  }
  return nullptr;
}

const Table* best() {
  for (const Table* t : TABLES) {
    if (runs(*t)) return t;
  }
  return &generic::table;
}

const Table* current = best();

}  // namespace

const Table& active() { return *current; }

const char* compiled(int i) { return i < COUNT ? TABLES[i]->name : nullptr; }

bool runnable(const char* name) {
  const Table* t = find(name);
  return t && runs(*t);
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool set_active(const char* name) {
  const Table* t = find(name);
  if (!t || !runs(*t)) return false;
  current = t;
  return true;
}

}  // namespace fusae::cpu
