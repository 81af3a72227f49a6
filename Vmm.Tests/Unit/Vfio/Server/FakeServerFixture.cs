using Vmm.Devices.Vfio.User.Server;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>Gives each test a fake device behind a server, and a client that has negotiated a version.</summary>
internal abstract class FakeServerFixture : IDisposable
{
    protected FakeServerFixture(VfioUserServerOptions? options = null)
    {
        Served = new ServedDevice(Fake, options);
        Client = Served.Attach();
    }

    protected FakeVfioUserBackend Fake { get; } = new();

    protected ServedDevice Served { get; }

    protected RawVfioUserClient Client { get; }

    public void Dispose()
    {
        Client.Dispose();
        Served.Dispose();
        Assert.That((Fake.OpenSessions, Fake.Quiesced), Is.EqualTo((0, 0)), "the test left sessions or quiesces behind");
        GC.SuppressFinalize(this);
    }
}
