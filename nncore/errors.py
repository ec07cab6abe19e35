"""
What can go wrong in nncore, as one tree.

    NncoreError
    ├── ShapeError (ValueError)       an array's shape does not fit
    ├── DtypeError (TypeError)        an array's element type does not fit
    ├── ArgumentError (ValueError)    another argument is out of range
    ├── ModelError (ValueError)       the parts of a model do not make a model
    ├── ModelFileError (ValueError)   a file does not hold a model
    ├── RowFileError (ValueError)     a file does not hold rows of numbers
    └── ConversionError (ValueError)  an estimator cannot be converted

Every message says what was wrong and what was expected.
"""


class NncoreError(Exception):
    """Base of all errors that nncore raises on purpose."""


class ShapeError(NncoreError, ValueError):
    """An array's shape does not fit."""


class DtypeError(NncoreError, TypeError):
    """An array's element type does not fit."""


class ArgumentError(NncoreError, ValueError):
    """An argument that is no array is out of range."""


class ModelError(NncoreError, ValueError):
    """Layers, labels or names that do not make a model."""


class ModelFileError(NncoreError, ValueError):
    """A file that cannot be read as a model, or a model that no file can hold."""


class RowFileError(NncoreError, ValueError):
    """A file that cannot be read as rows of numbers."""


class ConversionError(NncoreError, ValueError):
    """An estimator that nncore cannot convert."""
