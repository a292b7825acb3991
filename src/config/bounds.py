"""Kinds of numbers in config sections, each with the range outside of which a value is a slip, not a wish.

Each range ends far beyond what anybody has trained, and before the arithmetic of a plan overflows or takes minutes.
"""

from typing import Annotated

from pydantic import Field

# ---- the model
Layers = Annotated[int, Field(ge=1, le=1000)]
Width = Annotated[int, Field(ge=1, le=2**20)]  # features, heads, experts
Vocabulary = Annotated[int, Field(ge=1, le=2**24)]  # token ids
NormEpsilon = Annotated[float, Field(ge=1e-12, le=0.1)]  # float32 must tell 1 + eps from eps alone
RopeTheta = Annotated[float, Field(gt=1.0, le=1e12)]  # at 1 all pairs turn alike
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]  # a factor on numbers of order 1

# ---- a batch and its steps
Tokens = Annotated[int, Field(ge=1, le=2**24)]  # of one sequence
Sequences = Annotated[int, Field(ge=1, le=2**20)]  # of one step
Window = Annotated[int, Field(ge=8, le=2**16)]  # of steps; a median of fewer says little
Steps = Annotated[int, Field(ge=1, le=2**31 - 1)]
StepsOrNever = Annotated[int, Field(ge=0, le=2**31 - 1)]  # 0: never
Temperature = Annotated[float, Field(ge=0.0, le=100.0)]  # 0: the likeliest token

# ---- the optimizer
LearningRate = Annotated[float, Field(ge=1e-30, le=10.0)]  # 1e-30 moves nothing, which is asked for now and then
WeightDecay = Annotated[float, Field(ge=0.0, le=100.0)]  # times the learning rate
Epsilon = Annotated[float, Field(ge=1e-30, le=1.0)]  # float32 ends at 1e-38
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
GradientNorm = Annotated[float, Field(ge=1e-6, le=1e6)]
Deviations = Annotated[float, Field(ge=1.0, le=1e6)]  # from a median; every sixth of a normal distribution is beyond 1
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

# ---- machines
Ranks = Annotated[int, Field(ge=1, le=2**16)]  # along one axis of a layout
Groups = Annotated[int, Field(ge=1, le=1024)]  # copies of a layout, each with a launcher of its own
PerNode = Annotated[int, Field(ge=1, le=1024)]  # GPUs of a machine, or cores of a GPU
Gibibytes = Annotated[float, Field(ge=1e-6, le=2**20)]  # from a kibibyte to a pebibyte
Minutes = Annotated[int, Field(ge=1, le=525_600)]  # a year
Seconds = Annotated[float, Field(ge=0.001, le=31_536_000.0)]  # a year; torch counts in milliseconds
SecondsOrNone = Annotated[float, Field(ge=0.0, le=31_536_000.0)]

# ---- anything else that is counted
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountFromZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
