using Vmm.Devices.Vfio.Kernel;

namespace Vmm.Tests.Lab;

/// <summary>The lab itself: without its devices nothing below would mean anything.</summary>
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
