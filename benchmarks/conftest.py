NETWORKS = "mobile_former_214m,mobile_former_26m,dmf_s,iformer_m"


def pytest_addoption(parser):
    parser.addoption("--networks", default=NETWORKS, help="whose layers are measured, separated by commas")
    parser.addoption("--eager", action="store_true", help="without torch.compile")
