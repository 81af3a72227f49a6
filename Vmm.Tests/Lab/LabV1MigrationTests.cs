using Vmm.Migration.Status;


namespace Vmm.Tests.Lab;

/// <summary>Whole migrations of protocol v1. They use group and container, because v1 works with the dirty log of type1 only.</summary>
[TestFixture(TestName = "MigrationV1(group)")]
public sealed class LabV1MigrationTests : LabDeviceFixture
{
    [TestCase(4096, 4096)]
    [TestCase(4096, 40)]
    [TestCase(64, 8192)]
    public async Task Spec5_4_V1MovesBetweenSectionsOfAnySize(int from, int to)
    {
        LabDevice source = Make("v1"), destination = Make("v1");
        (source["data_section_bytes"], destination["data_section_bytes"]) = (from, to);
        using var pair = new LabPair(iommufd: false, [source.Path], [destination.Path]);
        byte[] expected = LabMemory.Fill(LabPair.Io(pair.Source), 11);
        foreach (LabDevice device in Made) device["log"] = 0;
        await pair.MigrateWell();
        Assert.That(source.States, Is.EqualTo((int[])[3, 2, 0]), "pre-copy, stop-and-copy, stopped");
        Assert.That(destination.States, Is.EqualTo((int[])[4, 1]), "resuming, running");
        Assert.That(LabMemory.Read(LabPair.Io(pair.Destination)), Is.EqualTo(expected));
    }

    [Test]
    public async Task Spec5_2_AV1DeviceThatBreaksFailsTheMigration()
    {
        LabDevice source = Make("v1");
        using var pair = new LabPair(iommufd: false, [source.Path], [Make("v1").Path]);
        source["refuse_v1"] = "2 1";
        Assert.That((await pair.Migrate()).Source, Is.EqualTo(MigrationStatus.Failed));
    }
}
