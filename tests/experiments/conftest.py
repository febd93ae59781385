import pytest


@pytest.fixture(scope="module")
def one_thread():
    """These problems are small: where cores are shared, torch's threads would mostly wait for one another."""
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
