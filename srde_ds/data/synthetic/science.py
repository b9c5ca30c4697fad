"""Science items computed from data packages: `periodictable` for chemistry, `scipy.constants` for physics."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

Item = tuple[str, str]
"""(prompt, answer)"""

LAST_ELEMENT = 86
"""radon; beyond it, elements are short-lived"""

_COMPOUNDS = (
    "H2O CO2 CO NH3 CH4 C2H6 C3H8 C4H10 C2H4 C2H2 C6H6 CH4O C2H6O C2H4O2 C6H12O6 C12H22O11 NaCl KCl KBr NaF LiF "
    "NaOH KOH HCl HF HBr H2SO4 HNO3 H3PO4 H2S SO2 SO3 NO NO2 N2O N2O5 O3 H2O2 CaO MgO ZnO Fe2O3 Fe3O4 Al2O3 SiO2 "
    "TiO2 CuO CaCO3 MgCO3 Na2CO3 CaCl2 MgCl2 AlCl3 FeCl3 CuSO4 BaSO4 AgNO3 KNO3 NaNO3 KMnO4 SiC WC GaAs ZnS CaF2 UO2"
)


@cache
def _elements() -> list[Any]:
    import periodictable

    return [element for element in periodictable.elements if 1 <= element.number <= LAST_ELEMENT]


def _number(value: float) -> str:
    """Three significant digits, without an exponent or trailing zeros."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:.0f}" if abs(rounded) >= 100 or rounded == int(rounded) else f"{rounded:g}"


def neutrons(generator: Random) -> Item:
    """The number of neutrons in an isotope."""
    element = generator.choice(_elements())
    mass = generator.choice(element.isotopes)
    return (
        f"How many neutrons are in a nucleus of {element.name}-{mass}? Answer with the number.",
        str(mass - element.number),
    )


def heavier(generator: Random) -> Item:
    """The heavier one of two elements."""
    first, second = generator.sample(_elements(), 2)
    name = max((first, second), key=lambda element: element.mass).name
    return f"Which atom is heavier, {first.name} or {second.name}? Answer with the element.", name


def symbols(generator: Random) -> Item:
    """The symbols of three elements."""
    chosen = generator.sample(_elements(), 3)
    names = ", ".join(element.name for element in chosen)
    return (
        f"Give the chemical symbols of {names}. Answer with the symbols in this order.",
        ", ".join(element.symbol for element in chosen),
    )


def names(generator: Random) -> Item:
    """The names of two elements, from their symbols."""
    chosen = generator.sample(_elements(), 2)
    listed = " and ".join(element.symbol for element in chosen)
    return (
        f"Which elements have the symbols {listed}? Answer with the names in this order.",
        ", ".join(element.name for element in chosen),
    )


def electrons(generator: Random) -> Item:
    """The number of electrons in an ion."""
    element = generator.choice([element for element in _elements() if element.ions])
    charge = generator.choice(element.ions)
    sign = "+" if charge > 0 else "-"
    return (
        f"How many electrons does the ion {element.symbol} with charge {sign}{abs(charge)} have? "
        "Answer with the number.",
        str(element.number - charge),
    )


def atoms(generator: Random) -> Item:
    """The number of atoms of an element in several units of a compound."""
    import periodictable

    compound, molecules = generator.choice(_COMPOUNDS.split()), generator.randint(2, 9)
    content = periodictable.formula(compound).atoms
    element = generator.choice(sorted(content, key=str))
    return (
        f"How many {element.name} atoms are in {molecules} units of {compound}? Answer with the number.",
        str(int(content[element]) * molecules),
    )


def molar_mass(generator: Random) -> Item:
    """The mass in grams of an amount of a compound."""
    import periodictable

    compound, moles = generator.choice(_COMPOUNDS.split()), generator.randint(1, 10)
    return (
        f"What is the mass of {moles} mol of {compound} in grams? Answer with the nearest whole number.",
        f"{periodictable.formula(compound).mass * moles:.0f}",
    )


def conversion(generator: Random) -> Item:
    """A quantity in another unit."""
    from scipy import constants

    source, target, factor = generator.choice(
        [
            ("km", "m", constants.kilo),
            ("m", "cm", 1 / constants.centi),
            ("mm", "m", constants.milli),
            ("kg", "g", constants.kilo),
            ("h", "min", constants.hour / constants.minute),
            ("h", "s", constants.hour),
            ("days", "h", constants.day / constants.hour),
            ("miles", "km", constants.mile / constants.kilo),
            ("inches", "cm", constants.inch / constants.centi),
            ("feet", "m", constants.foot),
            ("pounds", "kg", constants.pound),
            ("kcal", "kJ", constants.calorie),
            ("km/h", "m/s", constants.kmh),
        ]
    )
    amount = generator.randint(2, 99)
    return f"Convert {amount} {source} to {target}. Answer with three significant digits.", _number(amount * factor)


def temperature(generator: Random) -> Item:
    """A temperature on another scale."""
    from scipy.constants import convert_temperature

    source, target = generator.sample(["Celsius", "Kelvin", "Fahrenheit"], 2)
    degrees = generator.randint(0, 400) if source == "Kelvin" else generator.randint(-40, 250)
    value = float(convert_temperature(degrees, source, target))
    return (
        f"Convert {degrees} {source} to {target}. Answer with the nearest whole number.",
        f"{round(value) + 0}",
    )


def mechanics(generator: Random) -> Item:
    """A quantity that follows from two others by a law of physics."""
    from scipy import constants

    a, b = generator.randint(2, 20), generator.randint(2, 20)
    prompt, value = generator.choice(
        [
            (f"A mass of {a} kg is accelerated by {b} m/s^2. What is the force in N?", a * b),
            (f"A current of {a} A flows through {b} ohm. What is the voltage in V?", a * b),
            (f"A voltage of {a} V drives {b} A. What is the power in W?", a * b),
            (f"A body of {a} kg moves at {b} m/s. What is its momentum in kg m/s?", a * b),
            (f"A body of {a} kg moves at {b} m/s. What is its kinetic energy in J?", a * b * b / 2),
            (f"What is the weight of {a * b} kg on Earth in N?", a * b * constants.g),
            (f"What is the wavelength in m of a radio wave of {a * b} MHz?", constants.c / (a * b * constants.mega)),
            (f"A wave of {a} Hz has a wavelength of {b} m. What is its speed in m/s?", a * b),
        ]
    )
    return f"{prompt} Answer with three significant digits.", _number(value)


SCIENCE: dict[str, Callable[[Random], Item]] = {
    "neutrons": neutrons,
    "heavier": heavier,
    "symbols": symbols,
    "names": names,
    "electrons": electrons,
    "atoms": atoms,
    "molar_mass": molar_mass,
    "conversion": conversion,
    "temperature": temperature,
    "mechanics": mechanics,
}
