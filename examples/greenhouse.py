"""A greenhouse: what does a partial derivative mean?

A plant grows best at 24 degrees and 60 % humidity. Two dials, one for each. If we turn only the temperature dial and leave
the humidity alone, does growth get better or worse, and how fast? That is a partial derivative. Both answers together, the
gradient, say which way to turn both dials; gradlens reads them off for us at each step.
"""

import torch

import gradlens

# How far from ideal the plant feels: 0 is perfect. Warm air makes dryness worse, so the two dials interact.


def discomfort(temperature, humidity):
    too_warm = (temperature - 24) / 10
    too_humid = (humidity - 60) / 20
    return too_warm**2 + too_humid**2 - 0.5 * too_warm * too_humid


print("The greenhouse is at 18 degrees and 75 % humidity. One dial at a time:\n")
print(gradlens.partials(discomfort, temperature=18, humidity=75), "\n")
print("The partial for temperature is negative: one more degree, humidity untouched, and the plant suffers less.")
print("The partial for humidity is positive: more humidity would hurt, so it should decrease.\n")

# The same by hand: turn one dial a little, hold the other, and divide.
h = 1e-4
rise = (discomfort(18 + h, 75) - discomfort(18 - h, 75)) / (2 * h)
print(f"Turning only the temperature dial by hand gives {rise:.4f} a degree.\n")

temperature = torch.tensor(18.0, requires_grad=True)
humidity = torch.tensor(75.0, requires_grad=True)

with gradlens.watch({"temperature": temperature, "humidity": humidity}) as lens:
    for step in range(6):
        temperature.grad = humidity.grad = None
        loss = discomfort(temperature, humidity)
        loss.backward()
        wish = lens.weights().set_index("parameter")["direction"]
        print(
            f"step {step}: {temperature.item():5.2f} degrees ({wish['temperature']}), "
            f"{humidity.item():5.2f} % ({wish['humidity']}), discomfort {loss.item():.4f}"
        )
        with torch.no_grad():  # turn each dial against its partial; humidity is in finer units, so it takes larger turns
            temperature -= 20 * temperature.grad
            humidity -= 80 * humidity.grad

    print("\n" + lens.explain("temperature"))
