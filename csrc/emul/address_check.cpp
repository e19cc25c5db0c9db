// Runs the kernel bodies on the host over random tables whose memory is cut to the byte, for AddressSanitizer and
// UndefinedBehaviorSanitizer: any access outside a tensor aborts. Values are checked against loops written here.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "launchers.h"
#include "numbers.h"
#include "position_key.h"
#include "quantize.h"

namespace {

std::mt19937_64 rng(7);
int64_t pick(int64_t low, int64_t high) { return low + static_cast<int64_t>(rng() % (high - low + 1)); }

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

std::vector<mrl::Tile> tiles_of(int64_t item, int64_t rows, int64_t cols, int64_t high, int64_t wide) {
  std::vector<mrl::Tile> tiles;
  for (int64_t r = 0; r < rows; r += high)
    for (int64_t c = 0; c < cols; c += wide)
      tiles.push_back({item, r, c, std::min(high, rows - r), std::min(wide, cols - c)});
  return tiles;
}

void check_copy() {
  const int64_t rows = pick(1, 9), cols = pick(1, 90), so = pick(0, 9), ss = cols + pick(0, 2) * 8, ds = cols + pick(0, 9);
  std::vector<float> src(so + (rows - 1) * ss + cols);
  std::vector<mrl::Bf16> dst((rows - 1) * ds + cols);
  for (float& x : src) x = mrl::float_of(static_cast<uint32_t>(rng()));
  const void* sources[] = {src.data()};
  void* destinations[] = {dst.data()};
  const mrl::CopyJob job{0, 0, so, 0, rows, cols, ss, ds};
  const auto tiles = tiles_of(0, rows, cols, pick(1, 9), pick(1, 3) * 16);
  require(mrl_copy_spans(sources, destinations, &job, tiles.data(), tiles.size(), mrl::kFloat32, mrl::kBfloat16, 2,
                         nullptr) == 0, "copy launch");
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const float x = src[so + r * ss + c];
      const uint16_t got = dst[r * ds + c].bits;
      require(std::isnan(x) ? got == 0x7FC0 : got == mrl::bf16_from(mrl::bits_of(x)).bits, "copied value");
    }
}

void check_quantize() {
  const int64_t rows = pick(1, 200), cols = pick(1, 200);
  std::vector<float> x(rows * cols);
  for (float& value : x) value = static_cast<float>(pick(-1000, 1000)) / 64;
  std::vector<uint8_t> codes(x.size());
  std::vector<float> scales(((rows + 127) / 128) * ((cols + 127) / 128));
  require(mrl_block_quantize(x.data(), codes.data(), scales.data(), rows, cols, mrl::kFloat32, nullptr) == 0, "launch");
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const float scale = scales[r / 128 * ((cols + 127) / 128) + c / 128];
      require(codes[r * cols + c] == mrl::e4m3_from(mrl::bits_of(x[r * cols + c] / scale)), "code");
    }
}

void check_accumulate() {
  const int64_t n = pick(1, 3000), num_parts = pick(1, 4), shift = pick(0, 1);
  std::vector<std::vector<float>> parts(num_parts, std::vector<float>(n + shift));
  std::vector<const void*> addresses;
  for (auto& part : parts) {
    for (float& value : part) value = static_cast<float>(pick(-1000, 1000)) / 64;
    addresses.push_back(part.data() + shift);
  }
  std::vector<float> out(n);
  require(mrl_accumulate(addresses.data(), num_parts, out.data(), n, mrl::kFloat32, mrl::kFloat32, shift == 0,
                         nullptr) == 0, "accumulate launch");
  for (int64_t i = 0; i < n; ++i) {
    float expected = parts[0][i + shift];
    for (int64_t p = 1; p < num_parts; ++p) expected += parts[p][i + shift];
    require(out[i] == expected, "sum");
  }
}

void check_checksum() {
  const int64_t rows = pick(1, 40), cols = pick(1, 90), offset = pick(0, 9), stride = cols + pick(0, 2) * 8;
  std::vector<uint16_t> words(offset + (rows - 1) * stride + cols);
  for (uint16_t& word : words) word = static_cast<uint16_t>(rng());
  const mrl::ChecksumSpan span{0, 1, static_cast<int64_t>(rng()), pick(0, 99), pick(0, 99), offset, rows, cols, stride};
  const void* tensors[] = {words.data()};
  const auto tiles = tiles_of(0, rows, cols, pick(1, 9), pick(1, 40));
  unsigned long long sums[2] = {5, 0};
  require(mrl_span_checksum(tensors, &span, tiles.data(), tiles.size(), mrl::kRaw, mrl::kRaw, 2, sums, nullptr) == 0,
          "checksum launch");
  uint64_t expected = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      expected += mrl::row_key(span.key, span.logical_row + r) * mrl::col_key(span.logical_col + c) *
                  (static_cast<uint64_t>(words[offset + r * stride + c]) + 1);
  require(sums[0] == 5 && sums[1] == expected, "checksum");
}

}  // namespace

int main() {
  for (int i = 0; i < 30; ++i) {
    check_copy();
    check_checksum();
    check_accumulate();
    if (i % 6 == 0) check_quantize();
  }
  std::puts("clean");
}
