using Vmm.Devices.Vfio.Kernel;

namespace Vmm.Tests.Lab;

/// <summary>Checks the lab itself, because no other lab test means anything without the lab's devices.</summary>
[TestFixture]
public sealed class LabHostTests : LabFixture
{
    [Test]
    public void TheKernelHasContainersIommufdAndCharacterDevices()
    {
        var paths = new VfioHostPaths();
        Assert.That((string[])[paths.Container, paths.Iommufd, paths.Dev + "/vfio/devices"], Is.All.Matches<string>(Path.Exists));
    }
}
