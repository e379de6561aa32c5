// SPDX-License-Identifier: Apache-2.0
// The structs of a C ABI in words, for its caller to compare with its own: a line "struct <bytes>"
// for each, followed by lines "<field> <offset> <bytes>".
#pragma once

#include <cstddef>
#include <cstdio>
#include <initializer_list>

namespace fq {

struct AbiField {
  const char* name;
  size_t offset;
  size_t bytes;
};

// A field of the struct S.
#define FQ_FIELD(field) \
  fq::AbiField { #field, offsetof(S, field), sizeof(S::field) }

class AbiText {
 public:
  void add(size_t bytes, std::initializer_list<AbiField> fields) {
    print("struct", bytes);
    for (const AbiField& field : fields) {
      print(field.name, field.offset, " ");
      print("", field.bytes);
    }
  }
  const char* text() const { return text_; }

 private:
  void print(const char* name, size_t number, const char* end = "\n") {
    const char* between = *name ? " " : "";
    used_ += snprintf(text_ + used_, kSize - used_, "%s%s%zu%s", name, between, number, end);
    if (used_ >= kSize) used_ = kSize - 1;  // cut off: it then equals nobody's
  }

  static constexpr size_t kSize = 8192;
  char text_[kSize] = {};
  size_t used_ = 0;
};

}  // namespace fq
