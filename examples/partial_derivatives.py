"""Partial derivatives, worked: one input changes, the others are held fixed.

Each example states what calculus gives by hand, and what gradlens measures.
"""

import torch

import gradlens

# --- 1. A function of two variables ---------------------------------------------------------------------------------
# f = x^2 + 3y. Hold y fixed: df/dx = 2x. Hold x fixed: df/dy = 3, wherever you stand.

print("f = x^2 + 3y at (2, 5)")
print(gradlens.partials(lambda x, y: x**2 + 3 * y, x=2, y=5), "\n")

# f = x^2 y: df/dx = 2xy, df/dy = x^2. Each partial may depend on both variables.
print("f = x^2 y at (3, -1)")
print(gradlens.partials(lambda x, y: x**2 * y, x=3, y=-1), "\n")

# f = x^3 + 5xy + y^2: df/dx = 3x^2 + 5y, df/dy = 5x + 2y.
print("f = x^3 + 5xy + y^2 at (1, 2)")
print(gradlens.partials(lambda x, y: x**3 + 5 * x * y + y**2, x=1, y=2), "\n")

# --- 2. A variable that is absent has partial 0 ---------------------------------------------------------------------

print("f = x^2 at (4, y = 7): y does not occur")
print(gradlens.partials(lambda x, y: x**2, x=4, y=7), "\n")

# --- 3. All partials in one vector are the gradient -----------------------------------------------------------------
# f = x^2 y + y^3 at (2, 3): df/dx = 2xy = 12, df/dy = x^2 + 3y^2 = 31. Here the variables are tensors that are watched.

x = torch.tensor(2.0, requires_grad=True)
y = torch.tensor(3.0, requires_grad=True)
with gradlens.watch({"x": x, "y": y}) as lens:
    (x**2 * y + y**3).backward()
    print("f = x^2 y + y^3 at (2, 3)")
    print(lens.weights()[["parameter", "value", "partial", "direction"]])
    print("the gradient:", lens.gradient().tolist(), "in the order", lens.names(), "\n")

# --- 4. Mixed partials are equal ------------------------------------------------------------------------------------
# d/dy of 2xy is 2x; d/dx of x^2 + 3y^2 is 2x as well: 4 at x = 2, whichever comes first.

print("the second partials of f = x^2 y + y^3 at (2, 3)")
print(gradlens.mixed_partials({"x": x, "y": y}, lambda at: at["x"] ** 2 * at["y"] + at["y"] ** 3, ["x", "y"]), "\n")

# --- 5. Which way to move ---------------------------------------------------------------------------------------------
# L = (w1 - 1)^2 + (w2 + 0.5)^2 is lowest at (1, -0.5). From (0.5, -1) both partials are -1: raising either weight lowers
# the loss, so both should increase.

w1 = torch.tensor(0.5, requires_grad=True)
w2 = torch.tensor(-1.0, requires_grad=True)
with gradlens.watch({"w1": w1, "w2": w2}) as lens:
    ((w1 - 1) ** 2 + (w2 + 0.5) ** 2).backward()
    print("L = (w1 - 1)^2 + (w2 + 0.5)^2 at (0.5, -1)")
    print(lens.weights()[["parameter", "value", "partial", "direction"]], "\n")

    # --- 6. How sensitive is the loss to one specific weight? ---------------------------------------------------------
    print(lens.explain("w1"))
