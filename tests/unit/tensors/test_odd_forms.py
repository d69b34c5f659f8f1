"""Tensors without dense values of their own: what is shared stays as it is, what cannot be averaged is named."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import polyak
from polyak.errors import ArgumentError, MismatchError, PolyakError, UsageError
from polyak.tensors.memory import copy_on_write, odd_form

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # torch's, of beta and deprecated forms


def fake():
    with FakeTensorMode():
        return torch.ones(3)


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


FORMS = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(3, device="meta"),
    "wrapper": lambda: TwoTensor(torch.ones(3), torch.ones(3)),
    "masked": lambda: masked_tensor(torch.ones(3), torch.tensor([True, False, True])),
    "jagged": lambda: nested(torch.jagged),
    "nested": lambda: nested(torch.strided),
    "fake": fake,
    "mkldnn": lambda: torch.ones(3, 3).to_mkldnn(),
}
FLOATING = [name for name in FORMS if name != "quantised"]
COPYABLE = ["coo", "quantised", "wrapper", "jagged"]  # by deepcopy, as torch has it


def model_with(tensor, *, as_weight=False):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    nn.init.ones_(model[0].weight)
    if as_weight:
        model.extra = nn.Parameter(tensor, requires_grad=True)
    else:
        model.register_buffer("extra", tensor)
    return model


def averaged_twice(model, **options):
    average = polyak.Average(model, polyak.SWA(), **options)
    average.update()
    with torch.no_grad():
        model[0].weight.add_(2)
    average.update()
    return average


@pytest.mark.parametrize("form", FORMS)
class TestWhatIsNotAveraged:
    @pytest.fixture(params=["buffer", "excluded weight"])
    def options(self, request, form):
        if request.param == "buffer":
            return {}
        if form == "quantised":
            pytest.skip("no parameter that trains")
        return {"exclude": "extra"}

    def test_it_is_shared_in_every_use(self, form, options):
        model = model_with(FORMS[form](), as_weight=bool(options))
        extra, weight = model.extra, model[0].weight.detach().clone()
        average = averaged_twice(model, **options)
        for in_place in (False, True):
            with average.applied(in_place=in_place, check=True):
                assert model.extra is extra
                assert torch.equal(model[0].weight, weight + 1)
        average.update_bn([torch.randn(4, 3)])
        average.load_state_dict(copy.deepcopy(average.state_dict()))
        assert average.averaged_tensors()["0.weight"].tolist() == (weight + 1).tolist()
        assert average.metrics()["distance"] > 0
        assert "extra" in str(average.plan())
        average.copy_to(model)
        assert model.extra is extra
        assert torch.equal(model[0].weight, weight + 1)

    def test_it_is_copied_to_another_model(self, form, options):
        model = model_with(FORMS[form](), as_weight=bool(options))
        other = model_with(FORMS[form](), as_weight=bool(options))
        averaged_twice(model, **options).copy_to(other)
        assert other.extra is not model.extra
        assert odd_form(other.extra) == odd_form(model.extra)
        assert isinstance(other.extra, nn.Parameter) == bool(options)

    def test_it_is_in_no_file_of_weights(self, form, options, tmp_path):
        average = averaged_twice(model_with(FORMS[form](), as_weight=bool(options)), **options)
        for name in ("a.safetensors", "a.pt"):
            with pytest.raises(ArgumentError, match=r"extra \(.*persistent=False"):
                average.save(tmp_path / name)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_a_buffer_that_is_not_persistent_does_not_stop_saving(form, tmp_path):
    model = model_with(torch.ones(1))
    model.register_buffer("cache", FORMS[form](), persistent=False)
    averaged_twice(model, average_buffers="extra").save(tmp_path / "a.pt")


@pytest.mark.parametrize("form", FLOATING)
def test_a_weight_is_refused_by_name(form):
    average = polyak.Average(model_with(FORMS[form](), as_weight=True), polyak.SWA())
    if form == "meta":
        with pytest.raises(UsageError, match="extra: on the meta device"):
            average.update()
    else:
        for use in (average.update, average.plan):
            with pytest.raises(ArgumentError, match=r"extra \(.*exclude=\['extra'\]"):
                use()
    assert average.empty


def test_all_of_them_are_named():
    model = model_with(FORMS["coo"](), as_weight=True)
    model.other = nn.Parameter(FORMS["wrapper"]())
    with pytest.raises(ArgumentError, match=r"extra \(sparse_coo\), other \(a TwoTensor\)"):
        polyak.Average(model, polyak.SWA()).update()


def test_a_model_on_the_meta_device_has_a_plan():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    average = polyak.Average(model, polyak.SWA())
    assert average.plan().nbytes == 32
    with pytest.raises(UsageError, match="meta device"):
        average.update()
    with pytest.raises(UsageError, match="meta device"):
        polyak.update_bn(nn.Sequential(model, nn.BatchNorm1d(2, device="meta")), [torch.ones(2, 3)])
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    average.update()
    assert average.count == 1


@pytest.mark.parametrize("width", [1, 3])
def test_values_that_are_one_are_refused(width):
    model = model_with(torch.ones(1))
    model.scale = nn.Parameter(torch.ones(1).expand(width), requires_grad=False)
    average = polyak.Average(model, polyak.SWA(), include=["scale", "0.weight"])
    if width == 1:
        average.update()
        return
    with pytest.raises(ArgumentError, match=r"scale \(expanded"):
        average.update()


class TestBits:
    """Weights that torch conjugates or negates when they are read."""

    @staticmethod
    def conjugate():
        return torch.tensor([1 + 2j, 3 - 4j, -5 + 0.5j]).conj()

    @staticmethod
    def negative():
        return torch.tensor([1 + 2j, 3 - 4j, -5 + 0.5j]).conj().imag

    @pytest.mark.parametrize("make", ["conjugate", "negative"])
    @pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"nonfinite": "raise"}])
    @pytest.mark.parametrize("profile", [polyak.SWA(), polyak.Window(5)])
    def test_they_are_averaged(self, make, options, profile, tmp_path):
        value = getattr(self, make)()
        assert value.is_conj() or value.is_neg()
        plain = value.resolve_conj().resolve_neg().clone()
        model = nn.Module()
        model.w = nn.Parameter(value)
        average = polyak.Average(model, profile, **options)
        average.update()
        with torch.no_grad():
            model.w.add_(2)
        average.update()
        for in_place in (False, True):
            with average.applied(check=True, in_place=in_place):
                assert torch.allclose(model.w, plain + 1)
            assert torch.allclose(model.w, plain + 2)
        assert average.metrics()["distance"] == pytest.approx(3**0.5)
        again = polyak.Average(model, profile, **options)
        again.load_state_dict(copy.deepcopy(average.state_dict()))
        again.copy_to(model)
        assert torch.allclose(model.w, plain + 1)

    def test_a_nan_in_one_is_found(self):
        model = nn.Module()
        model.w = nn.Parameter(torch.tensor([1 + 2j, complex(0, float("nan"))]).conj())
        with pytest.raises(PolyakError, match="NaN or infinity in w"):
            polyak.Average(model, polyak.SWA(), nonfinite="raise").update()

    def test_a_large_one_in_several_groups(self):
        torch.manual_seed(0)
        value = torch.randn(1 << 20, dtype=torch.complex64).conj()
        model = nn.Module()
        model.w = nn.Parameter(value)
        averages = polyak.Averages(model, {"a": polyak.SWA(), "b": polyak.EMA(0.5)})
        averages.update()
        assert torch.equal(averages["b"].averaged_tensors()["w"], value)


class TestAveragedModel:
    @pytest.mark.parametrize("form", COPYABLE)
    def test_buffers_are_those_of_the_newest(self, form):
        model = model_with(FORMS[form]())
        averaged = polyak.swa_utils.AveragedModel(model, use_buffers=True)
        averaged.update_parameters(model)
        averaged.update_parameters(model)
        assert odd_form(averaged.module.extra) == odd_form(model.extra) != ""

    def test_a_sparse_buffer_may_have_another_pattern(self):
        model = model_with(torch.eye(3).to_sparse())
        averaged = polyak.swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        model.extra = torch.ones(3, 3).to_sparse()
        averaged.update_parameters(model)
        assert averaged.module.extra.to_dense().tolist() == torch.ones(3, 3).tolist()

    @pytest.mark.parametrize("form", FLOATING)
    def test_weights_are_averaged_or_refused_by_name(self, form):
        model = model_with(FORMS[form](), as_weight=True)
        try:
            averaged = polyak.swa_utils.AveragedModel(model)
            averaged.update_parameters(model)
        except UsageError as error:
            assert "extra" in str(error)
        else:
            assert form == "wrapper"
            assert torch.equal(averaged.module.extra.a, model.extra.a)


def test_nothing_odd_is_lent():
    for make in FORMS.values():
        assert copy_on_write(make()) is None
    assert copy_on_write(torch.ones(3)) is not None
    assert not odd_form(nn.Parameter(torch.ones(3)))


def test_another_form_is_not_copied_into():
    average = averaged_twice(model_with(FORMS["coo"]()))
    with pytest.raises(MismatchError, match="sparse_coo"):
        average.copy_to(model_with(torch.eye(3)))
