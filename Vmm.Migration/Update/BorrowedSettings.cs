using Vmm.Core.SaveVm;
using Vmm.Migration.Engine;
using Vmm.Migration.Parameters;

namespace Vmm.Migration.Update;

/// <summary>
/// Replaces the engine's settings for an update; <see cref="Dispose"/> restores the ones that were set for migrations. An update must not use those,
/// because the new process does not know them: it would not expect multifd channels, for example.
/// </summary>
internal sealed class BorrowedSettings : IDisposable
{
    private readonly IMigrationEngine _engine;
    private readonly MigrationParameters _parameters;
    private readonly KeyValuePair<MigrationCapability, bool>[] _capabilities;

    private BorrowedSettings(IMigrationEngine engine)
    {
        _engine = engine;
        _parameters = engine.Parameters;
        _capabilities = [.. MigrationCapabilitySet.Implemented.Select(c => KeyValuePair.Create(c, engine.Capabilities.IsOn(c)))];
    }

    internal static BorrowedSettings Take(IMigrationEngine engine, MigrationMode mode, bool returnPath, IReadOnlyList<string>? execCommand = null)
    {
        var settings = new BorrowedSettings(engine);
        try
        {
            engine.SetCapabilities(settings._capabilities.Select(c => KeyValuePair.Create(c.Key, returnPath && c.Key == MigrationCapability.ReturnPath)));
            engine.Parameters = settings._parameters with { Mode = mode, CprExecCommand = execCommand ?? settings._parameters.CprExecCommand };
            return settings;
        }
        catch
        {
            settings.Dispose();
            throw;
        }
    }

    public void Dispose()
    {
        _engine.Parameters = _parameters;
        _engine.SetCapabilities(_capabilities);
    }
}
