"""Runs an optimized XLA:GPU program operation by operation. Supports the operations of optimizer updates."""

import re

import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import hlo

DTYPES = {"pred": "bool", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}
DTYPES |= {f"{kind}{bits}": f"{name}{bits}" for kind, name in (("s", "int"), ("u", "uint")) for bits in (4, 8, 16, 32)}
COMPARISONS = {"EQ": lax.eq, "NE": lax.ne, "LT": lax.lt, "LE": lax.le, "GT": lax.gt, "GE": lax.ge}
SAME = """abs add ceil floor maximum:max minimum:min multiply:mul divide:div subtract:sub negate:neg power:pow sqrt
  rsqrt exponential:exp log sign and:bitwise_and or:bitwise_or xor:bitwise_xor not:bitwise_not is-finite:is_finite
  shift-left:shift_left shift-right-logical:shift_right_logical cbrt""".split()
PLAIN = {xla: getattr(lax, name or xla) for xla, _, name in (entry.partition(":") for entry in SAME)}


def run(text: str, arguments: list) -> list:
  """Runs a program and returns its results."""
  computations, entry = hlo.parse(text)
  return _run(computations, computations[entry], arguments)


def _run(computations, computation, arguments):
  env = {}
  for i in computation.instructions.values():
    env[i.name] = _instruction(computations, i, [env[name] for name in i.operands], arguments)
  root = env[computation.root]
  return root if isinstance(root, list) else [root]


def _instruction(computations, i, values, arguments):
  dtype = jnp.dtype(DTYPES[i.arrays[0].dtype]) if i.arrays else None
  match i.opcode:
    case "parameter":
      return arguments[i.number]
    case "constant":
      (number,) = re.findall(r"constant\(([^)]*)\)", i.text)
      return jnp.asarray(number == "true" if i.arrays[0].dtype == "pred" else np.array(number).astype(dtype))
    case "tuple":
      return values
    case "get-tuple-element":
      return values[0][i.number]
    case "fusion" | "call":
      results = _run(computations, computations[i.called], values)
      return results if len(i.arrays) > 1 or i.text.split(" = ")[1].startswith("(") else results[0]
    case "broadcast":
      found = re.search(r"dimensions=\{([\d,]*)\}", i.text)
      return lax.broadcast_in_dim(values[0], i.arrays[0].shape, [int(d) for d in found[1].split(",") if d])
    case "bitcast" | "bitcast-convert" | "reshape" | "copy":
      value = values[0] if values[0].dtype == dtype else lax.bitcast_convert_type(values[0], dtype)
      return value.reshape(i.arrays[0].shape)
    case "reduce":  # only by maximum
      (axes,) = re.findall(r"dimensions=\{([\d,]*)\}", i.text)
      body = computations[i.called].instructions.values()
      assert [j.opcode for j in body] == ["parameter", "parameter", "maximum"]
      return lax.reduce_max(values[0], [int(a) for a in axes.split(",")])
    case "iota":
      return lax.broadcasted_iota(dtype, i.arrays[0].shape, int(re.search(r"iota_dimension=(\d+)", i.text)[1]))
    case "convert":
      return lax.convert_element_type(values[0], dtype)
    case "compare":
      return COMPARISONS[re.search(r"direction=(\w+)", i.text)[1]](*values)
    case "select":
      return jnp.where(*values)
    case "clamp":
      return lax.clamp(*values)
    case _:
      return PLAIN[i.opcode](*values)
