// Memory for vectors.
#pragma once

#include <cstdint>
#include <vector>

// A floating-point array that starts on a cache line (64 bytes).
class Floats {
  public:
    explicit Floats(int64_t count) : storage_(size_t(count) + 16) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(storage_.data());
        data_ = reinterpret_cast<float*>((at + 63) / 64 * 64);
    }
    Floats(Floats&&) = default;  // a moved vector keeps its memory; a copied one would not
    Floats& operator=(Floats&&) = default;
    float* data() const { return data_; }

  private:
    std::vector<float> storage_;
    float* data_;
};
