"""Teachers: any model that scores classes, asked in one way. `as_teacher` finds the kind that fits."""

from minikd.teachers.choose import as_teacher
from minikd.teachers.ensemble import Ensemble
from minikd.teachers.estimators import EstimatorTeacher, trained
from minikd.teachers.functions import FunctionTeacher, ModelTeacher
from minikd.teachers.onnx import OnnxTeacher
from minikd.teachers.pytorch import TorchTeacher
from minikd.teachers.tables import HardLabels, StoreTeacher, TableTeacher
from minikd.teachers.teacher import Teacher

__all__ = [
    "Ensemble",
    "EstimatorTeacher",
    "FunctionTeacher",
    "HardLabels",
    "ModelTeacher",
    "OnnxTeacher",
    "StoreTeacher",
    "TableTeacher",
    "Teacher",
    "TorchTeacher",
    "as_teacher",
    "trained",
]
