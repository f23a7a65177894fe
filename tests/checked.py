"""The annotations of lora_lite are checked while the tests run, and only the calls that need more than beartype pay it.

jaxtyping binds the arguments of every call to its signature, at 10 µs a call; an attach is 4,500 calls. Here a function
without an array in its annotations is beartype's alone, at 1 µs, and one with arrays has a scope of its own for their
sizes. What is left to jaxtyping is what beartype reads otherwise: classes, generators, annotations in quotes.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import jaxtyping
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import AbstractArray, TypeCheckError

_jaxtyped: Any = jaxtyping.jaxtyped


def parts(annotation: Any) -> list[Any]:
    """The annotation and all that it is made of."""
    if get_origin(annotation) is Literal:
        return [annotation]
    inner = annotation if isinstance(annotation, list) else get_args(annotation)
    return [annotation, *(part for one in inner for part in parts(one))]


def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """In the place of jaxtyping's decorator, which the import hook of its pytest plugin puts on all of lora_lite."""

    def decorate(fn: Any) -> Any:
        annotations = getattr(fn, "__annotations__", {}).values()
        named = [part for one in annotations for part in parts(one)]
        if not inspect.isfunction(fn) or inspect.isgeneratorfunction(fn) or any(isinstance(p, str) for p in named):
            return _jaxtyped(fn, typechecker=typechecker)
        checked = typechecker(fn)
        if not any(inspect.isclass(part) and issubclass(part, AbstractArray) for part in named):

            @functools.wraps(fn)
            def unless_off(*args: Any, **kwargs: Any) -> Any:
                return fn(*args, **kwargs) if jaxtyping.config.jaxtyping_disable else checked(*args, **kwargs)

            return unless_off

        @functools.wraps(fn)
        def in_a_scope(*args: Any, **kwargs: Any) -> Any:
            if jaxtyping.config.jaxtyping_disable:
                return fn(*args, **kwargs)
            with _jaxtyped("context"):
                try:
                    return checked(*args, **kwargs)
                except BeartypeCallHintViolation as error:
                    raise TypeCheckError(str(error)) from error

        return in_a_scope

    return decorate


jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
