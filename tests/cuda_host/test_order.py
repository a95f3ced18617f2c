"""Which block of a low-bit product computes what. lowbit_int8: every part once, a cluster shares its tokens.
lowbit_stream: blocks that read the same weights run beside each other."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
#include "cuda/lowbit_int8.cu"
#include <set>
using namespace jointnas;
int main() {
  long checked = 0;
  for (int cluster : {1, 2, 4})
    for (int rows = 1; rows <= 70 * kBlockRows; rows += 61)
      for (int token_blocks : {1, 2, 3, 7, 16, 33}) {
        LowbitArgs p{};
        p.rows = rows;
        p.cluster = cluster;
        const int row_blocks = row_blocks_of(p);
        if (row_blocks % cluster || (row_blocks - cluster) * kBlockRows >= rows) return 1;
        std::set<std::pair<int, int>> seen;
        Part before{};
        for (int i = 0; i < row_blocks * token_blocks; ++i) {
          const Part part = part_of(i, row_blocks, token_blocks);
          if (part.row_block < 0 || part.row_block >= row_blocks) return 2;
          if (part.token_block < 0 || part.token_block >= token_blocks) return 2;
          if (!seen.insert({part.row_block, part.token_block}).second) return 3;
          if (i % cluster && part.token_block != before.token_block) return 4;
          if (i % cluster && part.row_block != before.row_block + 1) return 4;
          before = part;
          ++checked;
        }
      }
  // eight tokens of a group are 1024 contiguous bytes, and a byte is where wgmma looks for it
  for (int tokens : {1, 8, 9, 300})
    for (int token = 0; token < tokens; ++token)
      for (int at = 0; at < kGroup; ++at, ++checked) {
        const size_t place = place_swizzled(tokens, token, 2, at);
        const size_t block = (2 * ((tokens + 7) / 8) + token / 8) * size_t(1024);
        size_t offset = token % 8 * 128 + at;
        offset ^= (offset >> 7 & 7) << 4;
        if (place != block + offset) return 5;
      }
  return checked > 100000 ? 0 : 6;
}
"""


STREAM = """
#include "cuda/lowbit_stream.cu"
#include <vector>
using namespace jointnas;
int main() {
  const int tokens = 70, rows = 200, tiles = 13;  // five passes of 16 tokens, four strips of 64 rows
  std::vector<Vec4> weight(tiles * 64), scale(tiles * 2), x(tokens * 16), y(tokens * rows / 8);
  LowbitArgs p{};
  p.weight = weight.data(), p.scale = scale.data(), p.x = x.data(), p.y = y.data();
  p.tokens = tokens, p.rows = rows, p.inputs = 128, p.w_bits = 4, p.token_tiles = 2, p.warp_rows = 1, p.splits = 1;
  if (lowbit_stream(p, nullptr)) return 1;
  const dim3 grid = emu::grid_size();  // x is what is started first
  return grid.x == 5 && grid.y == 1 && grid.z == 4 ? 0 : 2;
}
"""


@pytest.mark.parametrize("program", [PROGRAM, STREAM], ids=["int8", "stream"])
def test_parts_and_places(program, tmp_path):
    source = tmp_path / "order.cpp"
    source.write_text(program)
    command = ["g++", "-std=c++17", "-O1", "-DJN_EMULATE", "-Wno-unknown-pragmas"]
    command += [f"-I{ROOT / 'csrc'}"]
    command += [str(source), "-o", str(tmp_path / "order")]
    subprocess.run(command, check=True)
    assert subprocess.run([tmp_path / "order"], check=False).returncode == 0
