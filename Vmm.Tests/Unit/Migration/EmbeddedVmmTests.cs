using Vmm.Samples.EmbeddedVmm;

namespace Vmm.Tests.Unit.Migration;

[TestFixture]
public class EmbeddedVmmTests
{
    [Test]
    public async Task TheSampleMigratesOneVmIntoAnotherInOneProcess()
    {
        var output = new StringWriter();
        Assert.That(await Sample.RunAsync(output), Is.Zero, output.ToString());
        Assert.That(output.ToString().Trim(), Is.EqualTo("completed: source PostMigrate, destination Running, memory 'hello', counter 42"));
    }
}
